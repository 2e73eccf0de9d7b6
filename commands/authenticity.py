"""`dermis authenticity ...`: compare images with the training images of a generator to find copies."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from commands.classify import image_files
from commands.options import (
    DEMO_BUNDLE,
    BundleOption,
    DeviceOption,
    OptionalDataOption,
    OutFolderOption,
    PerceptualOption,
    SampleSeedOption,
    ScheduleOption,
    StepsOption,
)
from commands.project import project
from dermis.errors import DataError, RequestError
from dermis.files import write_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.authenticity.audit import ProjectionAudit, SampleAudit
    from dermis.authenticity.checker import Checker
    from dermis.bundle import Bundle
    from dermis.imaging import Images

authenticity_app = typer.Typer(no_args_is_help=True, help="Find images that are copies of training images.")

_COLUMNS = ("file", "authentic", "distance", "percentile", "radius", "changed_copy")
_CHUNK = 64
_PAIRS = 8
_SHOWN_PAIRS = 100


@authenticity_app.command("check")
def check(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    bundle: BundleOption = DEMO_BUNDLE,
    out: Annotated[Path | None, typer.Option(help="File to write, .csv; default: CSV on stdout.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 2 if an image is not authentic.")] = False,
    data: OptionalDataOption = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Page to write, .html, that shows the nearest training images of --data, for their owner only."
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Compare images with the training images: the distance to the nearest one, and whether the image is authentic.

    The bundle needs an index. Images that cannot be read are named and left out, and the exit status is 1.
    """
    from tqdm import tqdm

    from dermis.authenticity.checker import Checker
    from dermis.authenticity.verdict import baseline_problem, baseline_sentence

    if out is not None and out.suffix.lower() != ".csv":
        raise RequestError("--out", f"{out.name} must end in .csv")
    if (data is None) != (show is None):
        raise RequestError("--show", "needs --data, the training images, and --data needs --show, the page to write")
    if show is not None and show.suffix.lower() != ".html":
        raise RequestError("--show", f"{show.name} must end in .html")
    files = image_files(images)
    rows: list[dict[str, Any]] = []
    unreadable: list[tuple[Path, str]] = []
    with Checker(bundle, device=device) as checker, tqdm(total=len(files), unit="img", disable=None) as bar:
        for paths, squares in _chunks(files, checker.description.resolution, unreadable):
            verdicts = checker.check(squares)
            columns = (verdicts.authentic, verdicts.distances, verdicts.percentiles, verdicts.radii)
            changed_copies = [None] * len(paths) if verdicts.copies is None else verdicts.copies.astype(int).tolist()
            table = zip(paths, changed_copies, *(column.tolist() for column in columns), strict=True)
            for path, changed_copy, authentic, *numbers in table:
                row = (str(path), int(authentic), *(round(number, 4) for number in numbers), changed_copy)
                rows.append(dict(zip(_COLUMNS, row, strict=True)))
            bar.update(len(paths))
        if data is not None and show is not None:
            page = _pairs_page(checker, rows, data, bundle)
            write_file(show, page.encode())
    for path, problem in unreadable:
        typer.echo(f"{path}: {problem}", err=True)
    text = _csv(rows)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_file(out, text.encode())
    changed = sum(row["changed_copy"] == 1 for row in rows)
    copies = sum(not row["authentic"] for row in rows)
    near = sum(row["percentile"] < 1 for row in rows)
    typer.echo(
        f"{len(rows):,} images: {len(rows) - copies:,} authentic, {copies:,} not; {near:,} are nearer to a training image "
        "than 99 % of the training images are to any other",
        err=True,
    )
    if checker.copies is not None:
        typer.echo(f"{changed:,} are changed copies of training images according to the copy detector", err=True)
    typer.echo(f"baseline: {baseline_sentence(checker.description)}", err=True)
    if (reason := baseline_problem(checker.description)) is not None:
        typer.echo(f"warning: copies may pass: {reason}", err=True)
    if unreadable:
        raise DataError(f"{len(unreadable):,} of {len(files):,} images could not be read and are left out")
    if strict and (copies or changed):
        raise typer.Exit(2)


def _pairs_page(checker: Checker, rows: Sequence[dict[str, Any]], data: Path, bundle: str) -> str:
    """The page of the checked images that are nearest to a training image, beside the nearest images of `data`."""
    from tqdm import tqdm

    from dermis.authenticity.pairs_page import Pair, pairs_page
    from dermis.image_reading import read_training_image
    from training.data.sources import read_source

    source = read_source(data)
    files = [record.image for record in source.records if record.image is not None]
    if not files:
        raise DataError(f"{data}: contains no images")
    size = checker.description.resolution
    shown = sorted(rows, key=lambda row: (row["percentile"], row["distance"]))[:_SHOWN_PAIRS]
    images = [read_training_image(Path(row["file"]).read_bytes(), size=size) for row in shown]
    features = checker.index.projected(checker.embed(images))
    distances = np.full(len(shown), np.inf)
    nearest = np.zeros(len(shown), dtype=np.int64)
    with tqdm(total=len(files), desc="training images", unit="img", disable=None) as bar:
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            embeddings = checker.embed([read_training_image(file.read_bytes(), size=size) for file in part])
            others = checker.index.projected(embeddings)
            between = np.linalg.norm(features[:, None].astype(np.float64) - others[None], axis=2)
            best = between.argmin(1)
            nearer = between[np.arange(len(shown)), best] < distances
            distances[nearer] = between[nearer, best[nearer]]
            nearest[nearer] = start + best[nearer]
            bar.update(len(part))
    names = [record.id for record in source.records if record.image is not None]
    pairs = [
        Pair(
            name=row["file"],
            image=image,
            training_name=names[number],
            training_image=read_training_image(files[number].read_bytes(), size=size),
            distance=row["distance"],
            shown_distance=float(distance),
            percentile=row["percentile"],
            authentic=bool(row["authentic"]),
            changed_copy=None if row["changed_copy"] is None else bool(row["changed_copy"]),
        )
        for row, image, number, distance in zip(shown, images, nearest.tolist(), distances.tolist(), strict=True)
    ]
    return pairs_page(pairs, checked=len(rows), source=data.name, bundle=bundle)


@authenticity_app.command("audit")
def audit(
    images: Annotated[list[Path], typer.Option(help="Training images: a folder, or files; may be repeated.")],
    out: OutFolderOption,
    bundle: BundleOption = DEMO_BUNDLE,
    count: Annotated[int, typer.Option(help="Number of training images to project, spread evenly; 0 for all.")] = 200,
    samples: Annotated[
        int, typer.Option(help="Number of images to generate and compare, of all classes in turn.")
    ] = 2000,
    seed: SampleSeedOption = 0,
    schedule: ScheduleOption = "fast",
    steps: StepsOption = None,
    distance: PerceptualOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Audit a bundle as in the paper: compare projections of training images, and samples, with the training images.

    The bundle needs an index. Writes REPORT.md, audit.json, projections.csv and pairs.png (the closest and the farthest
    projections beside their targets, which are real images) into --out, and the projections into --out/projections.
    """
    from dermis.authenticity.audit import audit_projections, audit_samples
    from dermis.authenticity.checker import Checker
    from dermis.bundle import open_bundle

    if count < 0 or samples < 1:
        raise RequestError("--count", "must be at least 0, and --samples at least 1")
    opened = open_bundle(bundle)
    files = image_files(images)
    if count and count < len(files):
        files = [files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int)]
    with Checker(opened, device=device) as checker:
        project(
            images=files,
            out=out / "projections",
            bundle=bundle,
            schedule=schedule,
            steps=steps,
            space=None,
            start=None,
            patience=None,
            distance=distance,
            class_name=None,
            video=None,
            batch_size=None,
            device=device,
        )
        targets, projected, names = _pairs_of(files, out / "projections", checker.description.resolution)
        projection_audit = audit_projections(checker.index, checker.embed(targets), checker.embed(projected))
        sample_audit = audit_samples(checker.index, _sampled(checker, opened, samples, seed, device))
        write_file(
            out / "projections.csv", _csv(list(_audit_rows(names, projection_audit)), columns=_AUDIT_COLUMNS).encode()
        )
        document = _document(checker, opened, projection_audit, sample_audit, samples)
    write_file(out / "audit.json", (json.dumps(document, indent=2) + "\n").encode())
    write_file(out / "REPORT.md", _report(document).encode())
    write_file(out / "pairs.png", _sheet(opened, projection_audit, targets, projected))
    typer.echo(_report(document).split("\n\n")[1])
    typer.echo(f"Baseline: {document['baseline']['stands_on']}.")
    if document["baseline"]["weakness"]:
        typer.echo(f"warning: copies may pass: {document['baseline']['weakness']}", err=True)
    typer.echo(f"{out / 'REPORT.md'}")


_AUDIT_COLUMNS = ("file", "cosine_distance", "distance", "percentile", "nearest_is_target", "too_close")


def _audit_rows(names: Sequence[str], audit: ProjectionAudit) -> Iterator[dict[str, Any]]:
    columns = (
        audit.cosine,
        audit.verdicts.distances,
        audit.verdicts.percentiles,
        audit.nearest_is_target,
        audit.not_authentic,
    )
    for name, cosine, distance, percentile, is_target, close in zip(names, *(c.tolist() for c in columns), strict=True):
        row = (name, round(cosine, 5), round(distance, 4), round(percentile, 2), int(is_target), int(close))
        yield dict(zip(_AUDIT_COLUMNS, row, strict=True))


def _pairs_of(files: Sequence[Path], folder: Path, size: int) -> tuple[Images, Images, list[str]]:
    """Read targets and projections, uint8 [N, R, R, 3], and the names of the targets."""
    from dermis.image_reading import read_training_image
    from dermis.projection.result import from_bytes

    targets, projected = [], []
    for file in files:
        result = folder / f"{file.stem}.safetensors"
        projected.append(from_bytes(result.read_bytes(), str(result))[0].image)
        targets.append(read_training_image(file.read_bytes(), size=size))
    return np.stack(targets), np.stack(projected), [str(file) for file in files]


def _sampled(checker: Checker, bundle: Bundle, count: int, seed: int, device: str) -> NDArray[np.float32]:
    """Features [N, D] of generated samples, of all classes in turn."""
    from tqdm import tqdm

    from dermis.dataset.request import classes_of
    from dermis.synthesizer import Synthesizer

    classes = len(classes_of(bundle))
    parts = []
    with Synthesizer(bundle, device=device) as synthesizer:
        for start in tqdm(range(0, count, _CHUNK), "samples", unit="batch", disable=None):
            indices = range(start, min(start + _CHUNK, count))
            images = synthesizer.images([seed] * len(indices), indices, [i % classes for i in indices])
            parts.append(checker.embed(images))
    return np.concatenate(parts)


def _document(
    checker: Checker, bundle: Bundle, projections: ProjectionAudit, sample_audit: SampleAudit, samples: int
) -> dict[str, Any]:
    from dermis.authenticity.audit import spread
    from dermis.authenticity.verdict import baseline_problem, baseline_sentence

    description = checker.description
    duplicates = description.duplicates
    return {
        "bundle": {"name": bundle.name, "digest": bundle.digest},
        "index": {"digest": description.digest, "extractor": description.extractor, "vectors": description.vectors},
        "projections": {
            "count": len(projections.cosine),
            "cosine_distance": spread(projections.cosine),
            "nearest_distance": spread(projections.verdicts.distances),
            "nearest_is_target": int(projections.nearest_is_target.sum()),
            "too_close": int(projections.not_authentic.sum()),
            "too_close_to_target": int((projections.not_authentic & projections.nearest_is_target).sum()),
        },
        "samples": {
            "count": samples,
            "authentic": sample_audit.authentic,
            "too_near": sample_audit.below_first_percentile,
            "held_out_authentic": sample_audit.held_out_authentic,
            "held_out_too_near": sample_audit.held_out_below_first_percentile,
            "exposure": asdict(sample_audit.exposure),
        },
        "baseline": {
            **{f"p{percentile}": description.radii[percentile] for percentile in (1, 5, 25, 50, 75, 95)},
            "stands_on": baseline_sentence(description),
            "weakness": baseline_problem(description),
            "duplicates": None if duplicates is None else asdict(duplicates),
        },
    }


def _report(document: dict[str, Any]) -> str:
    """Write the report in Markdown."""
    from dermis.authenticity.attack import INTERVAL

    audit, samples = document["projections"], document["samples"]
    cosine, attack = audit["cosine_distance"], samples["exposure"]["attack"]
    share = audit["too_close_to_target"] / audit["count"]
    paragraphs = [
        f"# Audit of {document['bundle']['name']} ({document['bundle']['digest'][:12]})",
        f"{audit['count']:,} training images were projected. Cosine distance of a projection's features "
        f"({document['index']['extractor']}) from its target's: mean {cosine['mean']:.4f}, median {cosine['p50']:.4f}, "
        f"minimum {cosine['p0']:.4f}, 1 % below {cosine['p1']:.4f}.\n"
        f"For {audit['nearest_is_target']:,} projections the nearest of all {document['index']['vectors']:,} training images "
        f"is the target. {audit['too_close']:,} are not authentic (the distance to the nearest training image is at most the "
        f"radius of that image), {audit['too_close_to_target']:,} of them with their own target as nearest image: {share:.1%}.",
        "If a projection is not authentic and its target is the nearest image, gradient descent on the latent can make the "
        "generator reproduce this training image. That is weaker evidence of copying than a sample that is not authentic (see "
        "below), but these images should be inspected first (`pairs.png`, left pairs).",
        f"Baseline: {document['baseline']['stands_on']}.",
        *([f"**Copies may pass: {document['baseline']['weakness']}.**"] if document["baseline"]["weakness"] else []),
        "## Samples",
        f"Of {samples['count']:,} generated images {samples['authentic']:.1%} are authentic, and {samples['too_near']:.2%} are "
        "nearer to a training image than 99 % of the training images are to any other.",
    ]
    if samples["held_out_authentic"] is not None:
        paragraphs.append(
            f"For comparison, of held-out real images {samples['held_out_authentic']:.1%} are authentic, and "
            f"{samples['held_out_too_near']:.2%} are that near. A generator that copies nothing should have similar numbers."
        )
    paragraphs.append(
        f"Identifiability: {samples['exposure']['identifiability']:.1%} of the training images are nearer to a sample than to "
        "any other training image."
    )
    if attack is None:
        paragraphs.append("The index has no held-out images, so membership inference was not measured.")
    else:
        paragraphs.append(
            f"Membership inference by distance: AUC {attack['auc']:.3f} (0.5 is guessing; 95 % interval {attack['low']:.3f} to "
            f"{attack['high']:.3f}; {attack['members']:,} training and {attack['held_out']:,} held-out images). {INTERVAL}; "
            "`dermis privacy audit` counts patients."
        )
    return "\n\n".join(paragraphs) + "\n"


def _sheet(bundle: Bundle, audit: ProjectionAudit, targets: Images, projected: Images) -> bytes:
    """Contact sheet with the closest pairs of target and projection on the left and the farthest on the right."""
    from dermis.image_metadata import origin_of
    from dermis.imaging import contact_sheet, encode

    order = np.argsort(audit.cosine, kind="stable")
    closest, farthest = order[:_PAIRS], order[::-1][:_PAIRS]
    cells = []
    for near, far in zip(closest, farthest, strict=True):
        cells += [targets[near], projected[near], targets[far], projected[far]]
    return encode(contact_sheet(np.stack(cells), columns=4), origin=origin_of(bundle, "compositeSynthetic"))


def _chunks(
    files: Sequence[Path], size: int, unreadable: list[tuple[Path, str]]
) -> Iterator[tuple[list[Path], NDArray[np.uint8]]]:
    """Read images [N, size, size, 3] in threads; those that cannot be read are added to `unreadable`."""
    from dermis.image_reading import ImageError, read_training_image
    from training.data.images import in_threads

    def read(path: Path) -> Images | str:
        try:
            return read_training_image(path.read_bytes(), size=size)
        except (ImageError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)

    paths: list[Path] = []
    squares: list[Images] = []
    for path, image in zip(files, in_threads(read, files), strict=True):
        if isinstance(image, str):
            unreadable.append((path, image))
        else:
            paths.append(path)
            squares.append(image)
        if len(paths) == _CHUNK:
            yield paths, np.stack(squares)
            paths, squares = [], []
    if paths:
        yield paths, np.stack(squares)


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = _COLUMNS) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
