"""The card of a generated dataset: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dermis.dataset.containers import SOURCE
from dermis.dataset.plan import Plan

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


def dataset_card(plan: Plan, bundle: Bundle) -> str:
    """Markdown. Says nothing that is not in the plan or in the bundle; no date."""
    request = plan.request
    licence = str(bundle.provenance.get("licence") or "unknown")
    attribution = str(bundle.provenance.get("attribution") or "not stated")
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in request.classes.items())
    size = bundle.generator.img_resolution
    options = {
        "seed": request.seed,
        "truncation_psi": request.truncation_psi,
        "truncation_cutoff": request.truncation_cutoff,
        "noise_mode": request.noise_mode,
        "image_format": request.image_format,
    }
    if request.image_format != "png":
        options["image_quality"] = request.image_quality
    told = "\n".join(f"| `{name}` | {json.dumps(value)} |" for name, value in options.items())
    return f"""---
{_front_matter(plan, licence)}
---

# {request.samples:,} synthetic dermoscopy images

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


def _front_matter(plan: Plan, licence: str) -> str:
    known = licence.lower() in _LICENCES
    lines = [f"license: {licence.lower() if known else 'other'}"]
    if not known:
        lines.append(f"license_name: {json.dumps(licence)}")
    lines += [
        "pretty_name: Synthetic dermoscopy",
        "task_categories: [image-classification]",
        "tags: [synthetic, dermoscopy, medical]",
        f"size_categories: [{json.dumps(_size_category(plan.samples))}]",
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
