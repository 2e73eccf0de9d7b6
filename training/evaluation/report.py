"""The evaluation page: one HTML file without other files. It shows training images, so it is not part of a bundle."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dermis.errors import DermisError
from dermis.files import atomic_write
from dermis.html_page import Section, html_page, picture, table
from dermis.image_metadata import ImageOrigin
from dermis.imaging import Images, as_rgb, contact_sheet
from training.evaluation.pictures import STEPS, Match
from training.evaluation.table import copies, held_out_text, path_length_text, space_tables

COLUMNS = 8
_OTHERS = "real images, which are <strong>not</strong> the set that the generator was trained on"
_LEGEND = """<p class="note">FD, KID and MMD measure how far the generated images are from the real ones as a whole: lower is
better. Precision, density and alpha-precision measure whether each generated image looks real; recall, coverage and
beta-recall whether all kinds of real images are generated. FLD is 0 for images as good as real ones; a generalisation gap far
below that of the reference column means that training images are copied. If images were held out, the reference column has the
scores of real images instead of generated ones, which are those of a perfect generator.</p>"""


def check_report_folder(report: Path, bundle: Path) -> None:
    """Check that the folder of the page is not inside the bundle: bundles are shared, training images are not.

    Raises:
        DermisError: It is inside the bundle.
    """
    if report.resolve().is_relative_to(bundle.resolve()):
        raise DermisError(
            f"--report: {report} lies inside the bundle; the page shows training images, choose another folder"
        )


def write_report(folder: Path, page: str) -> Path:
    """Write `folder`/index.html and return its path.

    Raises:
        DermisError: The file cannot be written.
    """
    path = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, concurrent=True) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DermisError(f"--report: {folder}: cannot be written: {error.strerror}") from None
    return path


def report_page(
    origin: ImageOrigin,
    metrics: Mapping[str, Any],
    class_names: Sequence[str],
    samples: Mapping[str, Images],
    closest: Sequence[Match],
    unselected: Sequence[Match],
    interpolations: Mapping[str, Images],
) -> str:
    """Make the page.

    Args:
        origin: The bundle, which the files of the pictures name.
        metrics: metrics.json in version 2.
        class_names: Names of the classes; empty without classes.
        samples: Generated images by caption.
        closest: The samples that are most like copies.
        unselected: Other samples.
        interpolations: Images by caption, row after row.

    Returns:
        HTML.
    """
    side = next(iter(samples.values())).shape[1]
    scale = max(1, 128 // side)  # small images are enlarged without interpolation
    kind = "training" if metrics["real_is_training_set"] else "real"
    spaces = "".join(
        f'<h3>Feature space {html.escape(each.space)}</h3><p class="note">{html.escape(each.remark)}</p>'
        + _table(f"Numbers in {each.space}", each.rows)
        + (
            f"<h4>By class</h4>{_table(f'Numbers in {each.space} by class', each.class_rows)}"
            if each.class_rows
            else ""
        )
        for each in space_tables(metrics)
    )
    numbers = f"""<p class="note">{metrics["images"]:,} generated images (seed {metrics["seed"]}, truncation_psi
{metrics["truncation_psi"]:g}, {metrics["noise_mode"]} noise) and {metrics["real_images"]:,}
{"training images" if kind == "training" else _OTHERS}. Numbers of different spaces cannot be compared. In brackets: 95%
intervals. {html.escape(held_out_text(metrics))}</p>
{spaces}
{_LEGEND}
<p class="note">{html.escape(path_length_text(metrics))}</p>
"""
    like_copies = f"""<p class="note">The generated images (left) that are nearer to one {kind} image than to others, and their
{len(closest[0].distances)} nearest {kind} images. The distance ratio is the distance to the first of them divided by that
to the last: 0 for a copy, near 1 if no {kind} image is much nearer than the others. Check
whether the first one shows the same lesion.</p>
"""
    return html_page(
        f"Evaluation of {origin.generator}",
        [
            Section("numbers", "Numbers", numbers),
            Section(
                "copies",
                "Copies of training images",
                "".join(f'<p class="note">{html.escape(text)}</p>' for text in copies(metrics)),
            ),
            Section(
                "samples",
                "Samples",
                '<p class="note">The first samples of the seed, not selected.</p>\n'
                + "".join(_sheet(caption, images, COLUMNS, scale, origin) for caption, images in samples.items()),
            ),
            Section(
                "like-copies",
                "Most like a copy",
                like_copies + "".join(_match(match, class_names, scale, kind, origin) for match in closest),
            ),
            Section(
                "others",
                f"Nearest {kind} images of other samples",
                '<p class="note">Samples at equal intervals among all generated ones, not selected.</p>\n'
                + "".join(_match(match, class_names, scale, kind, origin) for match in unselected),
            ),
            Section(
                "interpolations",
                "Interpolations",
                '<p class="note">Straight lines in w between two samples. The images of a generator that has learnt the '
                "distribution change smoothly; those of one that memorises jump from one training image to the next.</p>\n"
                + "".join(_sheet(caption, images, STEPS, scale, origin) for caption, images in interpolations.items()),
            ),
        ],
        warnings=[
            "<strong>This page shows training images.</strong> Only people who are allowed to see the training data are "
            "allowed to see this page; do not put it into a bundle or publish it."
        ],
        interactive=True,
    )


def _table(name: str, rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    return table(name, [head[0] or "measure", *head[1:]], body, classes="sortable numbers")


def _match(match: Match, class_names: Sequence[str], scale: int, kind: str, origin: ImageOrigin) -> str:
    gap = np.full((match.image.shape[0], 4, 3), 255, dtype=np.uint8)
    row = np.concatenate([as_rgb(match.image[None])[0], gap, *as_rgb(match.neighbours)], axis=1)
    distances = ", ".join(f"{d:.2f}" for d in match.distances)
    of_class = f" of {html.escape(class_names[match.label])}" if class_names else ""
    alt = f"sample {match.sample} and its nearest {kind} images"
    shown = picture(row, alt, width=row.shape[1] * scale, origin=replace(origin, source_type="compositeSynthetic"))
    return f"""<figure>{shown}<figcaption>sample {match.sample}{of_class}, distance
ratio {match.distance_ratio:.2f}<br>distances {distances}</figcaption></figure>"""


def _sheet(caption: str, images: Images, columns: int, scale: int, origin: ImageOrigin) -> str:
    sheet = contact_sheet(as_rgb(images), columns, padding=1)
    return f"<h3>{html.escape(caption)}</h3>{picture(sheet, caption, width=sheet.shape[1] * scale, origin=origin)}"
