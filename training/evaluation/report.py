"""The evaluation page: one HTML file without other files. It shows training images, so it is not part of a bundle."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dermis.errors import DermisError
from dermis.files import atomic_write
from dermis.imaging import Images, as_rgb, contact_sheet, encode
from training.evaluation.pictures import STEPS, Match
from training.evaluation.table import copies, held_out_text, path_length_text, space_tables

COLUMNS = 8
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d5dae1; }
th:first-child, td:first-child { text-align: left; }
img { image-rendering: pixelated; max-width: 100%; display: block; margin: .3rem 0 1rem; }
.warning { background: #fdeaea; border-left: .4rem solid #b3261e; padding: .6rem 1rem; }
.note { color: #55606e; max-width: 48rem; }
figure { margin: 0 0 .8rem; display: flex; gap: 1rem; align-items: center; }
figcaption { color: #55606e; font-size: .85rem; }
"""
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
    name: str,
    metrics: Mapping[str, Any],
    class_names: Sequence[str],
    samples: Mapping[str, Images],
    closest: Sequence[Match],
    unselected: Sequence[Match],
    interpolations: Mapping[str, Images],
) -> str:
    """Make the page.

    Args:
        name: Name of the bundle.
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
        f'<h3>Feature space {html.escape(table.space)}</h3><p class="note">{html.escape(table.remark)}</p>'
        + _table(table.rows)
        + (f"<h4>By class</h4>{_table(table.class_rows)}" if table.class_rows else "")
        for table in space_tables(metrics)
    )
    texts = "".join(f'<p class="note">{html.escape(text)}</p>' for text in copies(metrics))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation of {html.escape(name)}</title><style>{_STYLE}</style>
<h1>Evaluation of {html.escape(name)}</h1>
<p class="warning"><strong>This page shows training images.</strong> Only people who are allowed to see the training data are
allowed to see this page; do not put it into a bundle or publish it.</p>
<h2>Numbers</h2>
<p class="note">{metrics["images"]:,} generated images (seed {metrics["seed"]}, truncation_psi
{metrics["truncation_psi"]:g}, {metrics["noise_mode"]} noise) and {metrics["real_images"]:,}
{"training images" if kind == "training" else _OTHERS}. Numbers of different spaces cannot be compared. In brackets: 95%
intervals. {html.escape(held_out_text(metrics))}</p>
{spaces}
{_LEGEND}
<p class="note">{html.escape(path_length_text(metrics))}</p>
<h2>Copies of training images</h2>
{texts}
<h2>Samples</h2>
<p class="note">The first samples of the seed, not selected.</p>
{"".join(_sheet(caption, images, COLUMNS, scale) for caption, images in samples.items())}
<h2>Most like a copy</h2>
<p class="note">The generated images (left) that are nearer to one {kind} image than to others, and their
{len(closest[0].distances)} nearest {kind} images. The distance ratio is the distance to the first of them divided by that
to the last: 0 for a copy, near 1 if no {kind} image is much nearer than the others. Check
whether the first one shows the same lesion.</p>
{"".join(_match(match, class_names, scale, kind) for match in closest)}
<h2>Nearest {kind} images of other samples</h2>
<p class="note">Samples at equal intervals among all generated ones, not selected.</p>
{"".join(_match(match, class_names, scale, kind) for match in unselected)}
<h2>Interpolations</h2>
<p class="note">Straight lines in w between two samples. The images of a generator that has learnt the distribution change
smoothly; those of one that memorises jump from one training image to the next.</p>
{"".join(_sheet(caption, images, STEPS, scale) for caption, images in interpolations.items())}
</html>
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{header}</tr>{lines}</table>"


def _match(match: Match, class_names: Sequence[str], scale: int, kind: str) -> str:
    gap = np.full((match.image.shape[0], 4, 3), 255, dtype=np.uint8)
    row = np.concatenate([as_rgb(match.image[None])[0], gap, *as_rgb(match.neighbours)], axis=1)
    distances = ", ".join(f"{d:.2f}" for d in match.distances)
    of_class = f" of {html.escape(class_names[match.label])}" if class_names else ""
    alt = f"sample {match.sample} and its nearest {kind} images"
    return f"""<figure>{_picture(row, scale, alt)}<figcaption>sample {match.sample}{of_class}, distance
ratio {match.distance_ratio:.2f}<br>distances {distances}</figcaption></figure>"""


def _sheet(caption: str, images: Images, columns: int, scale: int) -> str:
    return f"<h3>{html.escape(caption)}</h3>{_picture(contact_sheet(as_rgb(images), columns), scale, caption)}"


def _picture(image: Images, scale: int, alt: str) -> str:
    data = base64.b64encode(encode(image)).decode()
    return f'<img alt="{html.escape(alt)}" width="{image.shape[1] * scale}" src="data:image/png;base64,{data}">'
