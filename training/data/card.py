"""The data card of a prepared data set: its images, their sources, conditions of use, and missing metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dermis.skin_tone import CLASSES
from training.data.attributes import METADATA_COLUMNS


def data_card(
    name: str,
    rows: Sequence[Mapping[str, str]],
    skipped: int,
    resolution: int,
    sha256: str,
    licence: str,
    attribution: str,
) -> str:
    """Make the card in Markdown. It depends on the arguments only.

    Args:
        name: Name of the data set.
        rows: Rows of its metadata.csv.
        skipped: Number of images that were skipped.
        resolution: Side of the images in pixels.
        sha256: SHA-256 of ids, classes and files.
        licence: Licence of the images.
        attribution: Attribution of the images; "" if not stated.
    """
    classes = sorted({row["class"] for row in rows})
    sources = sorted({row["source"] for row in rows})
    count = Counter((row["source"], row["class"]) for row in rows)
    per_source = "\n".join(
        f"| {source} | {sum(count[source, cls] for cls in classes):,} | "
        + " | ".join(f"{count[source, cls]:,}" for cls in classes)
        + " |"
        for source in sources
    )
    names = " | ".join(name or "(no class)" for name in classes)
    totals = " | ".join(f"{sum(row['class'] == cls for row in rows):,}" for cls in classes)
    missing = "\n".join(
        f"| `{column}` | {sum(not row[column] for row in rows):,} |"
        for column in ("patient_id", "lesion_id", *METADATA_COLUMNS)
    )
    patients = len({row["patient_id"] for row in rows} - {""})
    return f"""# {name}

Dermoscopy images for training generators: {len(rows):,} images of {resolution} x {resolution} px, centre-cropped to a
square and resized with a Lanczos filter. **Real images of patients**: share them only as their licence allows.

## Images

| source | images | {names} |
| --- | --- | {" | ".join("---" for _ in classes)} |
{per_source}
| all | {len(rows):,} | {totals} |

{_skipped(skipped)} Patients named: {patients:,}.

| missing | images |
| --- | --- |
{missing}

{_skin(rows)}
## Conditions

| | |
| --- | --- |
| licence | {licence} |
| attribution | {attribution or "not stated"} |
{_rights(rows)}
## Files

| member | content |
| --- | --- |
| `00000/img00000000.png`, ... | the images, uncompressed RGB, numbered in the order of their ids |
| `dataset.json` | `labels`: class number of each image in alphabetical order of the classes, or null without classes |
| `metadata.csv` | a row for each image: id, class, patient, lesion, source and what else is known |
| `skipped.csv` | images that were skipped, and the reasons (if there were any) |

sha256 of ids, classes and files: `{sha256}`
"""


def _skipped(skipped: int) -> str:
    return f"{skipped:,} images were skipped; `skipped.csv` states the reasons." if skipped else "No image was skipped."


def _skin(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of skin types and tones; "" if neither is known."""
    types = Counter(row["skin_type"] for row in rows)
    tones = Counter(row["ita_class"] for row in rows)
    lines = [f"| Fitzpatrick type {name} | {types[name]:,} |" for name in sorted(types.keys() - {""})]
    lines += [f"| skin tone {name} | {tones[name]:,} |" for name in CLASSES if tones[name]]
    if not lines:
        return ""
    note = (
        "Types are those of the sources. Tones are estimated from the images (individual typology angle, `ita`), whose\n"
        "colours are not calibrated."
    )
    return "\n".join(["| skin | images |", "| --- | --- |", *lines, "", note, ""])


def _rights(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the licences and attributions of single images, which the ISIC Archive states."""
    lines = []
    for column, title in (("copyright_license", "licence of the image"), ("attribution", "attributed to")):
        for value, number in sorted(Counter(row.get(column, "") for row in rows).items()):
            if value:
                lines.append(f"| {title}: {value.replace('|', '/')} | {number:,} images |")
    return "\n".join(lines) + "\n" if lines else ""
