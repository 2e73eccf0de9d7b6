"""`dermis explain concepts`: test whether a classifier uses the black frame, rulers, hair or ink."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from commands.console import table_console
from commands.options import (
    ClassColumnOption,
    ClassifierOption,
    DataOption,
    MetadataOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from dermis.artefacts import Artefacts
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.counterfactual import Change
    from dermis.explain.tcav import ConceptTest
    from dermis.imaging import Images
    from training.data.concepts import ConceptRecords
    from training.data.sources import Record, Source

SHARE = 0.03  # share of the image under painted corners: real frames have 0.028 on average (docs/concepts.md)


def concepts(
    classifier: ClassifierOption,
    data: DataOption,
    out: Annotated[
        Path, typer.Option(help="New folder for concepts.json, table.md and a contact sheet of each concept.")
    ],
    split: Annotated[
        Path | None,
        typer.Option(help="Folder of `dermis data split`: concepts are from train and validation, inputs from test."),
    ] = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    size: Annotated[int, typer.Option(min=20, help="Number of images of a concept, and of each counter-set.")] = 40,
    counters: Annotated[int, typer.Option(min=3, help="Number of counter-sets; each gives a concept vector.")] = 12,
    inputs: Annotated[
        int, typer.Option(min=10, help="Number of images of the positive class whose logits are analysed.")
    ] = 60,
    artefacts: Annotated[
        Path | None,
        typer.Option(help="artefacts.csv of `dermis data inspect`, so that the images need not be inspected again."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Module of the backbone, or last; may be repeated. Default: two of the last modules."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images.")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Test what a classifier uses, by concept activation vectors and by painting frames onto images. Not a medical device.

    Images with a concept are found by the detectors of `dermis data inspect`; those of the counter-sets are of the same
    sources and classes.
    """
    from tqdm import tqdm

    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.classifier.torch_network import load_torch_classifier
    from dermis.errors import DataError
    from dermis.explain.tcav import Concept, corrected, layer_names, tcav
    from training.data.concepts import mine_concepts
    from training.data.sources import read_source
    from training.data.splits import check_empty, group_of, read_split

    check_empty(out)
    network = load_torch_classifier(classifier)
    layers = layer or layer_names(network)
    source = read_source(data, metadata=metadata, class_column=class_column, binary=True)
    part_of = read_split(split) if split is not None else {}
    inspected = _artefacts(source, artefacts, threads)
    pool = [pair for pair in inspected if split is None or part_of.get(pair[0].id) in ("train", "validation")]
    tested = [pair for pair in inspected if split is None or part_of.get(pair[0].id) == "test"]
    mined, left_out = mine_concepts(
        [record for record, _ in pool], [detected for _, detected in pool], size=size, counters=counters, seed=seed
    )
    for text in left_out:
        typer.echo(f"left out: {text}", err=True)
    if not mined:
        raise DataError(f"{data}: no concept has enough images; give more images")
    with Classifier(classifier, threads=threads) as session:
        side, positive = session.description.input.size, session.description.positive_class
        chosen = [record for record, _ in tested if record.class_name == positive]
        order = np.random.default_rng(seed).permutation(len(chosen))[:inputs]
        if len(order) < 10:
            raise DataError(f"{data}: {len(order)} images of {positive} to analyse; 10 are needed")
        x = _images([chosen[i] for i in sorted(order)], side)
        tests: list[ConceptTest] = []
        sets = [
            Concept(each.name, _images(each.shown, side), tuple(_images(part, side) for part in each.counters))
            for each in mined
        ]
        with tqdm(total=len(sets) * len(layers), desc="concepts", unit="test", disable=None) as bar:
            for test in tcav(network, sets, x, layers, seed=seed):
                tests.append(test)
                bar.update()
        tests = corrected(tests)
        groups = dict(zip((r.id for r in source.records), group_of(source.records), strict=True))
        changes, unusable = _frames(session, tested, groups, side)
    for text in unusable:
        typer.echo(f"left out: {text}", err=True)
    left_out = [*left_out, *unusable]
    document = {
        "classifier": session.description.digest,
        "inputs": len(x),
        "positive_class": positive,
        "tests": [asdict(test) | {"difference": test.difference, "verdict": test.verdict} for test in tests],
        "frame": {name: asdict(change) for name, change in changes.items()},
        "left_out": left_out,
        "notice": NOTICE,
    }
    _write(out, document, tests, changes, mined, side, positive)
    _show(table_console(), tests, changes, positive)
    typer.echo(f"{out}: table.md, concepts.json, and contact sheets, which show images of --data", err=True)
    typer.echo(NOTICE, err=True)


def _artefacts(source: Source, table: Path | None, threads: int | None) -> list[tuple[Record, Artefacts]]:
    """Detect artefacts in all readable images, or read them from the CSV of an inspection."""
    from dermis.artefacts import NAMES, Artefacts
    from dermis.errors import DataError, escape
    from training.data.inspection import inspect_source

    if table is None:
        inspection = inspect_source(source, workers=threads)
        return list(zip(inspection.opened, inspection.artefacts, strict=True))
    try:
        with table.open(newline="", encoding="utf-8") as file:
            by_id = {row["id"]: Artefacts(*(float(row[name]) for name in NAMES)) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--artefacts: {table}: is not an artefacts.csv of `dermis data inspect` ({escape(error)})"
        ) from None
    inspected = [
        (record, by_id[record.id]) for record in source.records if record.id in by_id and record.image is not None
    ]
    if not inspected:
        raise DataError(f"--artefacts: {table}: lists other images than those of {source.path}")
    return inspected


def _images(records: Sequence[Record], side: int) -> Images:
    """uint8 [N, S, S, 3] as the classifier sees them."""
    from dermis.image_reading import read_training_image

    return np.stack(
        [read_training_image(record.image.read_bytes(), side) for record in records if record.image is not None]
    )


def _frames(
    session: Classifier, tested: Sequence[tuple[Record, Any]], groups: dict[str, str], side: int
) -> tuple[dict[str, Change], list[str]]:
    """Measure how painting and cropping frames changes the calibrated probability of the tested images.

    Returns:
        The changes by name, and which images were left out.
    """
    from dermis.explain.counterfactual import Fill, change, frameless, with_corners, zoomed

    framed = [record for record, artefacts in tested if "frame" in artefacts.present]
    plain = [record for record, artefacts in tested if "frame" not in artefacts.present]

    def probability(images: Images) -> np.ndarray[Any, np.dtype[np.float64]]:
        return session.classify(images, features=False).calibrated

    fills: dict[str, Fill] = {"black corners painted": "black", "skin-coloured corners painted": "skin"}
    changes: dict[str, Change] = {}
    left_out: list[str] = []
    if plain:
        images, patients = _images(plain, side), [groups[record.id] for record in plain]
        before = probability(images)
        for name, fill in fills.items():
            after = probability(with_corners(images, SHARE, fill))
            changes[name] = change(before, after, patients)

    def crop(name: str, records: list[Record]) -> list[Record]:
        """Measure the change by cropping of the images that show no frame afterwards, and return these."""
        images = _images(records, side)
        cropped = zoomed(images)
        kept = frameless(cropped)
        if not kept.all():
            left_out.append(f"{name}: {(~kept).sum():,} of {len(records):,} images, which show a frame after it")
        records = [record for record, without in zip(records, kept, strict=True) if without]
        if records:
            patients = [groups[record.id] for record in records]
            changes[name] = change(probability(images[kept]), probability(cropped[kept]), patients)
        return records

    if framed:
        framed = crop("frame removed by cropping (images with a frame)", framed)
    if matched := _matched(framed, plain):
        crop("same cropping (images without a frame, of the same sources and classes)", matched)
    return changes, left_out


def _matched(framed: Sequence[Record], plain: Sequence[Record]) -> list[Record]:
    """Choose from `plain` as many images of each source and class as `framed` has, or as many as there are."""
    from collections import Counter

    from training.data.attributes import value_of

    missing = Counter((value_of(record.row, "source").casefold(), record.class_name) for record in framed)
    chosen = []
    for i in np.random.default_rng(0).permutation(len(plain)):
        group = value_of(plain[i].row, "source").casefold(), plain[i].class_name
        if missing[group] > 0:
            missing[group] -= 1
            chosen.append(plain[i])
    return chosen


def _rows(tests: Sequence[ConceptTest]) -> list[list[str]]:
    header = ["concept", "layer", "images", "CAV accuracy", "TCAV score", "of random CAVs", "p, corrected", "verdict"]
    return [
        header,
        *(
            [
                test.concept,
                test.layer,
                str(test.images),
                f"{test.accuracy:.2f}",
                f"{np.mean(test.scores):.2f} ± {np.std(test.scores):.2f}",
                f"{np.mean(test.random):.2f} ± {np.std(test.random):.2f}",
                f"{test.p_corrected:.1g}",
                test.verdict,
            ]
            for test in tests
        ),
    ]


def _change_rows(changes: dict[str, Change]) -> list[list[str]]:
    header = ["change", "images", "mean change of the probability", "95 %", "increased in"]
    rows = [
        [name, f"{c.images:,}", f"{c.mean:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", f"{c.rose:.0%}"]
        for name, c in changes.items()
    ]
    return [header, *rows]


def _show(console: Any, tests: Sequence[ConceptTest], changes: dict[str, Change], positive: str) -> None:
    from rich.table import Table

    for title, rows in (
        (f"Does the classifier use the concept for {positive}?", _rows(tests)),
        ("Frames", _change_rows(changes)),
    ):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table, "")


def _write(
    out: Path,
    document: dict[str, Any],
    tests: Sequence[ConceptTest],
    changes: dict[str, Change],
    mined: Sequence[ConceptRecords],
    side: int,
    positive: str,
) -> None:
    """Write the folder, completely or not at all."""
    import shutil

    from dermis.errors import StorageError
    from dermis.imaging import contact_sheet, encode
    from training.experiments.table import markdown_table

    text = "\n\n".join(
        [
            "# Concepts",
            f"**{document['notice']}**",
            f"TCAV scores towards {positive}, over {document['inputs']} images of that class.",
            markdown_table(_rows(tests)),
            f"Frames: change of the calibrated probability of {positive}.",
            markdown_table(_change_rows(changes)),
            *(f"Left out: {reason}." for reason in document["left_out"]),
        ]
    )
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "concepts.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (partial / "table.md").write_text(text + "\n", encoding="utf-8")
        for each in mined:
            sheet = np.concatenate([_images(each.shown, side)[:16], _images(each.counters[0], side)[:16]])
            (partial / f"{each.name}-above-counter-set-below.jpg").write_bytes(encode(contact_sheet(sheet), "jpeg", 85))
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"--out: {out}: cannot be written: {error.strerror}") from None
