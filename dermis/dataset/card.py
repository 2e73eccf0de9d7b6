"""The card of a generated dataset: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dermis.classifier.description import DEFAULT_THRESHOLD, NOTICE
from dermis.dataset.containers import SOURCE
from dermis.dataset.plan import Plan
from dermis.dataset.scoring import Tally

if TYPE_CHECKING:
    from dermis.bundle import Bundle

# Licences that the Hub knows by an identifier of its own; every other one is "other" with its name.
_LICENCES = ("cc-by-nc-4.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc0-1.0", "apache-2.0", "mit")

_LOADING = {
    "imagefolder": """`images.zip` unpacks to `images/<class>/SYN_<index>`, as torchvision's `ImageFolder` reads it,
with `metadata.csv` beside it.

```python
from datasets import load_dataset

dataset = load_dataset("imagefolder", data_files="images.zip")
```""",
    "webdataset": """Every sample is an image, its label (`.cls`) and its row of metadata (`.json`).

```python
import webdataset

dataset = webdataset.WebDataset("{pattern}", shardshuffle=False).decode("pil")
```""",
    "parquet": """```python
from datasets import load_dataset

dataset = load_dataset("parquet", data_files="data-*.parquet")  # columns image, label, ...
```""",
}


def dataset_card(plan: Plan, bundle: Bundle, tallies: Mapping[str, Tally] | None = None) -> str:
    """Markdown. Says nothing that is not in the plan, in the bundle or, if images are scored, in `tallies`; no date."""
    request = plan.request
    counts = dict(request.classes) if tallies is None else {name: found.images for name, found in tallies.items()}
    samples = sum(counts.values())
    licence = str(bundle.provenance.get("licence") or "unknown")
    attribution = str(bundle.provenance.get("attribution") or "not stated")
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    size = bundle.generator.img_resolution
    options: dict[str, Any] = {
        "seed": request.seed,
        "truncation_psi": request.truncation_psi,
        "truncation_cutoff": request.truncation_cutoff,
        "noise_mode": request.noise_mode,
        "image_format": request.image_format,
    }
    if request.image_format != "png":
        options["image_quality"] = request.image_quality
    if request.classifier is not None:
        options["classifier"] = request.classifier.model_dump()
    told = "\n".join(f"| `{name}` | {json.dumps(value)} |" for name, value in options.items())
    return f"""---
{_front_matter(plan, licence, samples)}
---

# {samples:,} synthetic dermoscopy images

![Preview](preview.png)

The first images of each class, class after class, not selected.

**Every image is synthetic**: drawn by the generator `{bundle.name}`, it shows the skin of nobody.
**Not for diagnosis**: class names say which class the generator was asked for, not what a dermatologist would see, and
the images carry the biases of the data that the generator learnt from. Whether single images resemble training images
too closely has not been checked by making this dataset.

| class | images |
| --- | --- |
{rows}

Images are RGB, {size} x {size} px, {request.image_format.upper()}.

## Loading

{_LOADING[request.format].format(pattern=_pattern(plan.shards))}

`metadata.csv` has the ISIC Archive's columns (`isic_id`, `patient_id`, `diagnosis`, `target`, `age_approx`, `sex`,
`anatom_site`), empty where an image of nobody has no value, and `source` ({SOURCE}), `file_name`, `label`, `seed`,
`index` and the `sha256` of each image file.
{_classifier_section(plan, tallies)}
## Origin

| | |
| --- | --- |
| generator | `{bundle.name}`, SHA-256 `{bundle.digest}` |
| licence of its training data, carried by its images | {licence} |
| attribution | {attribution} |
{told}

`manifest.json` lists every file with its SHA-256 and is enough to make the dataset again:

```
dermis generate --manifest manifest.json --bundle BUNDLE --out FOLDER
dermis verify FOLDER
```
"""


def _classifier_section(plan: Plan, tallies: Mapping[str, Tally] | None) -> str:
    if tallies is None or plan.classifier is None:
        return ""
    options = plan.request.classifier
    wanted = DEFAULT_THRESHOLD if options is None else options.threshold
    rows = "\n".join(
        f"| {name} | {found.images:,} | {'-' if found.agreeing is None else f'{found.agreeing:,}'} | "
        f"{found.drawn:,} | {found.rejected:,} |"
        for name, found in tallies.items()
    )
    told = f"""
## Classifier

`probability` is what the bundle's classifier says of each image before it was encoded: the calibrated probability of
{plan.classifier.positive_class}. It agrees with the class of an image if that is on the right side of its threshold
`{wanted}` ({plan.classifier.threshold(wanted):.4g}). The classifier is `{plan.classifier.architecture}`, SHA-256
`{plan.classifier.digest}`. {NOTICE}

| class | images | classifier agrees | drawn | rejected |
| --- | --- | --- | --- | --- |
{rows}
"""
    if options is not None and options.filters:
        kept = ["which the classifier agrees with"] if options.keep == "agreeing" else []
        if options.min_probability > 0 or options.max_probability < 1:
            kept.append(f"of a probability from {options.min_probability:g} to {options.max_probability:g}")
        missing = plan.samples - sum(found.images for found in tallies.values())
        told += f"""
**Filtered**: only images {" and ".join(kept)} were kept, from up to {options.tries} latents for each.
{missing:,} of {plan.samples:,} images are missing, as none of theirs was kept. What a filter rejects is variety: these
are images that suit this classifier, and whatever learns from them learns less of the rest. Of an image that was not
the first try, `index` is that of its latent, 2^34 higher for every further try.
"""
    return told


def _front_matter(plan: Plan, licence: str, samples: int) -> str:
    known = licence.lower() in _LICENCES
    lines = [f"license: {licence.lower() if known else 'other'}"]
    if not known:
        lines.append(f"license_name: {json.dumps(licence)}")
    lines += [
        "pretty_name: Synthetic dermoscopy",
        "task_categories: [image-classification]",
        "tags: [synthetic, dermoscopy, medical]",
        f"size_categories: [{json.dumps(_size_category(samples))}]",
    ]
    files = {"imagefolder": "images.zip", "webdataset": "data-*.tar", "parquet": "data-*.parquet"}[plan.request.format]
    lines += ["configs:", "- config_name: default", f"  data_files: {json.dumps(files)}"]
    return "\n".join(lines)


def _size_category(samples: int) -> str:
    """The Hub's names for sizes."""
    below = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for limit, name in below.items() if samples < limit), "10M<n<100M")


def _pattern(shards: int) -> str:
    """Brace pattern of all tar files."""
    return f"data-{{00000..{shards - 1:05d}}}-of-{shards:05d}.tar" if shards > 1 else "data-00000-of-00001.tar"
