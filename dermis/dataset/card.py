"""The card of a generated dataset: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dermis.authenticity.attack import INTERVAL
from dermis.bundle.citation import METHOD_CITATION
from dermis.bundle.classifier import DEFAULT_THRESHOLD, NOTICE
from dermis.dataset.columns import feature_kinds, features_code, features_yaml
from dermis.dataset.containers import SOURCE
from dermis.dataset.plan import DatasetPlan
from dermis.dataset.privacy import SHOWN, PrivacyReport, has_percentile
from dermis.dataset.scoring import ClassifierTally
from dermis.dataset.terms import Terms, dataset_citation, known_biases, terms_of, use_in_words
from dermis.imaging import SUFFIXES

if TYPE_CHECKING:
    from dermis.bundle import Bundle

_FOLDER = """```python
from pathlib import Path

from datasets import load_dataset

folder = Path.cwd()  # where this README.md is: its head declares the columns and the class names
dataset = load_dataset(str(folder), split="train")
```"""
_LOADING = {
    "imagefolder": f"""`images.zip` unpacks to `images/<class>/SYN_<index>`, as torchvision's `ImageFolder` reads it,
with `metadata.csv` beside it.

{_FOLDER}

Alone, `images.zip` needs the declaration in the call:

```python
from datasets import ClassLabel, Features, Image, Value, load_dataset

features = {{features}}
dataset = load_dataset("imagefolder", data_files="images.zip", features=features, split="train")
```""",
    "webdataset": f"""Every sample is an image, its label (`.cls`) and its row of metadata (`.json`).

{_FOLDER}

Alone, the tar files need the declaration in the call:

```python
from datasets import ClassLabel, Features, Image, Value, load_dataset

features = {{features}}
dataset = load_dataset("webdataset", data_files="data-*.tar", features=features, split="train")
```

With the library `webdataset`:

```python
import webdataset

class_names = {{class_names}}
dataset = webdataset.WebDataset("{{pattern}}", shardshuffle=False).decode("pil").to_tuple("{{suffix}}", "cls", "json")
```""",
    "parquet": f"""{_FOLDER}

The Parquet files carry the declaration too:

```python
from datasets import load_dataset

dataset = load_dataset("parquet", data_files="data-*.parquet", split="train")
```""",
}


def dataset_card(
    plan: DatasetPlan,
    bundle: Bundle,
    tallies: Mapping[str, ClassifierTally] | None = None,
    privacy: PrivacyReport | None = None,
) -> str:
    """Write the card of a dataset.

    It depends on the arguments alone: it has no date.

    Args:
        plan: The plan of the dataset.
        bundle: The bundle whose generator made the images.
        tallies: Results of the classifier by class, if the images were scored.
        privacy: Results of the gate, if the images were compared with the training images.

    Returns:
        Markdown with YAML front matter.
    """
    request = plan.request
    by_class = tallies if tallies is not None else privacy.classes if privacy is not None else None
    counts = (
        dict(request.classes)
        if by_class is None
        else {name: class_result.images for name, class_result in by_class.items()}
    )
    samples = sum(counts.values())
    terms = terms_of(bundle)
    licence = f"[{terms.licence}]({terms.url})" if terms.url else terms.licence
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
    if request.edits is not None:
        options["edits"] = [edit.model_dump() for edit in request.edits]
    if request.privacy is not None:
        options["privacy"] = request.privacy.model_dump()
    option_rows = "\n".join(f"| `{name}` | {json.dumps(value)} |" for name, value in options.items())
    biases = "\n".join(f"- {sentence}" for sentence in known_biases(plan, bundle))
    return f"""---
{_front_matter(plan, terms, samples)}
---

# {samples:,} synthetic dermoscopy images

![Preview](preview.png)

The first images of each class, class after class, not selected.

**Every image is synthetic**: made by the generator `{bundle.name}`. None is a photograph of a person, but a generator
can reproduce a training image.
**Not for diagnosis**: class names say which class the generator was asked for, not what a dermatologist would see, and
the images have the biases of the data that the generator was trained on. {_checked(privacy)}{_edited(plan)}

| class | images |
| --- | --- |
{rows}

Images are RGB, {size} x {size} px, {request.image_format.upper()}.

## Loading

{_loading(plan)}

`metadata.csv` has the ISIC Archive's columns (`isic_id`, `patient_id`, `diagnosis`, `target`, `age_approx`, `sex`,
`anatom_site`), empty where a synthetic image has no value, and `source` ({SOURCE}), `file_name`, `label`, `seed`,
`index` and the `sha256` of each image file.
{_classifier_section(plan, tallies)}{_privacy_section(plan, privacy)}
## Known biases

{biases}

## Origin

| | |
| --- | --- |
| generator | `{bundle.name}`, SHA-256 `{bundle.digest}` |
| licence of its training data, carried by its images | {licence} |
| attribution | {terms.attribution} |
| terms of use (Data Use Ontology) | {use_in_words(terms)} |
{option_rows}

`manifest.json` lists every file with its SHA-256 and is enough to make the dataset again:

```
dermis generate --manifest manifest.json --bundle BUNDLE --out FOLDER
dermis verify FOLDER
```

`croissant.json` describes the dataset for machines ([Croissant 1.0](https://docs.mlcommons.org/croissant/) with RAI).

## Citation

The dataset, whose version of dermis is in `manifest.json`, and the method of its generator:

```bibtex
{dataset_citation(plan, bundle)}

{METHOD_CITATION}
```
"""


def _classifier_section(plan: DatasetPlan, tallies: Mapping[str, ClassifierTally] | None) -> str:
    if tallies is None or plan.classifier is None:
        return ""
    options = plan.request.classifier
    threshold = DEFAULT_THRESHOLD if options is None else options.threshold
    rows = "\n".join(
        f"| {name} | {class_tally.images:,} | {'-' if class_tally.agreeing is None else f'{class_tally.agreeing:,}'} | "
        f"{class_tally.drawn:,} | {class_tally.rejected:,} |"
        for name, class_tally in tallies.items()
    )
    section = f"""
## Classifier

`probability` is the calibrated probability of {plan.classifier.positive_class} by the bundle's classifier,
for each image before it was encoded. The classifier agrees with the class of an image if this probability is on the
right side of the threshold `{threshold}` ({plan.classifier.threshold(threshold):.4g}). The classifier is
`{plan.classifier.architecture}`, SHA-256 `{plan.classifier.digest}`. {NOTICE}

| class | images | classifier agrees | candidates | rejected |
| --- | --- | --- | --- | --- |
{rows}
"""
    if options is not None and options.filters:
        kept = ["to which the classifier gives their class"] if options.keep == "agreeing" else []
        if options.min_probability > 0 or options.max_probability < 1:
            kept.append(f"with a probability from {options.min_probability:g} to {options.max_probability:g}")
        missing = plan.samples - sum(class_tally.images for class_tally in tallies.values())
        section += f"""
**Filtered**: only images {" and ".join(kept)} were kept, from up to {options.tries} latents for each.
{missing:,} of {plan.samples:,} images are missing, as all their candidates were rejected. A filter reduces variety:
images that this classifier finds difficult are missing, so a model that is trained on this dataset learns less about them.
`index` is that of the latent of the kept candidate: 2^34 higher for every further try.
"""
    return section


def _checked(privacy: PrivacyReport | None) -> str:
    if privacy is None:
        return "Whether single images are too similar to training\nimages has not been checked for this dataset."
    return "Every image was compared\nwith the training images: see Privacy."


def _edited(plan: DatasetPlan) -> str:
    if not plan.request.moves:
        return ""
    moves = ", ".join(f"`{edit.direction}` by {edit.strength:g}" for edit in plan.request.moves)
    return f"\n**Edited**: every latent was moved along {moves} standard deviations."


def _privacy_section(plan: DatasetPlan, privacy: PrivacyReport | None) -> str:
    options = plan.request.privacy
    if privacy is None or options is None:
        return ""
    gate = "authentic"
    if options.gate == "min_distance":
        gate = (
            f"no nearer to a training image than percentile {options.percentile:g} of the radii of the training images"
        )
        gate += "" if privacy.limit is None else f" ({privacy.limit:.4f})"
    outcomes = {
        "resample": f"was replaced by the image of another latent (up to {options.tries} latents for each image)",
        "drop": "is missing",
        "flag": "is included and flagged in the column `gate`",
    }
    classes = "\n".join(
        f"| {name} | "
        + " | ".join(
            f"{count:,}"
            for count in (
                class_tally.images,
                class_tally.authentic,
                class_tally.seen,
                class_tally.seen_authentic,
                class_tally.rejected,
                class_tally.flagged,
            )
        )
        + " |"
        for name, class_tally in privacy.classes.items()
    )
    images = sum(class_tally.images for class_tally in privacy.classes.values())
    missing = plan.samples - images
    head = " | ".join(f"{percentile} %" for percentile in SHOWN)
    generated = " | ".join(
        f"{distance:.4f}" if has_percentile(images, percentile) else "too few images"
        for percentile, distance in zip(SHOWN, privacy.distances, strict=True)
    )
    real = " | ".join(f"{distance:.4f}" for distance in privacy.baseline)
    attack = privacy.exposure.attack
    attack_text = (
        "Whether an attacker can tell training images from others was not measured: the index has no held-out images."
    )
    if attack is not None:
        attack_text = (
            "An attacker classifies a real image as a training image if a synthetic image is near it:\n"
            f"AUC {attack.auc:.3f} (0.5 is guessing; 95 % interval {attack.low:.3f} to {attack.high:.3f}), of "
            f"{attack.members:,} training and {attack.held_out:,} held-out images.\n{INTERVAL}.\n"
            "A privacy audit counts patients."
        )
    baseline = f"The baseline: {privacy.stands_on}.\n" if privacy.stands_on else ""
    if privacy.weakness is not None:
        baseline += f"\n**Copies may pass this check: {privacy.weakness}.**\n"
    outcome = outcomes[options.on_reject]
    detector = ", and that the copy detector does not take it for a changed copy" if plan.detects_copies else ""
    found = sum(class_tally.copies or 0 for class_tally in privacy.classes.values())
    detected = (
        f"\nThe copy detector took {found:,} of the images that were compared for mirrored, cropped, recoloured or otherwise "
        "changed\ncopies of training images. It takes about 1 % of new real images for copies, too.\n"
        if plan.detects_copies
        else ""
    )
    before, after = privacy.authentic_share_of_candidates, privacy.authentic_share_of_images
    return f"""
## Privacy

Every image was compared with the generator's training images, in the feature space of the bundle's index (SHA-256
`{privacy.index}`). An image is authentic if its distance to the nearest training image is larger than the radius of that
training image, which is its distance to the nearest other training image (Alaa et al., arXiv 2102.08921). The gate requires
that it is {gate}{detector}; an image that did not meet this condition
{outcome}. {missing:,} of {plan.samples:,} images are missing.

**Authentic: {before:.1%} of the images that were compared, {after:.1%} of those in the dataset.**
{detected}
| class | images | authentic | compared | compared and authentic | rejected | flagged |
| --- | --- | --- | --- | --- | --- | --- |
{classes}

Percentiles of the distances to the nearest training image, and of the radii of the training images:

| | {head} |
| --- | {" | ".join("---" for _ in SHOWN)} |
| these images | {generated} |
| training images | {real} |

{baseline}
Identifiability: {privacy.exposure.identifiability:.1%} of the training images are nearer to one of these images than to any
other training image (Yoon et al., ADS-GAN); it grows with the number of images.
{attack_text}

`nearest_distance`, `distance_percentile` and `authentic` have the result of each image. A gate finds copies of whole images
in one feature space; it does not prove that nothing about a patient can be learnt from a dataset.
"""


def _loading(plan: DatasetPlan) -> str:
    """Return the section on reading the files, whose code runs in the folder of the dataset."""
    return _LOADING[plan.request.format].format(
        features=features_code(feature_kinds(plan), plan.class_names),
        class_names=json.dumps(list(plan.class_names)),
        pattern=_pattern(plan.shards),
        suffix=SUFFIXES[plan.request.image_format].removeprefix("."),
    )


def _front_matter(plan: DatasetPlan, terms: Terms, samples: int) -> str:
    lines = [f"license: {terms.identifier or 'other'}"]
    if terms.identifier is None:
        lines.append(f"license_name: {json.dumps(terms.licence)}")
    lines += [
        "pretty_name: Synthetic dermoscopy",
        "task_categories: [image-classification]",
        "tags: [synthetic, dermoscopy, medical]",
        f"size_categories: [{json.dumps(_size_category(samples))}]",
    ]
    files = {"imagefolder": "images.zip", "webdataset": "data-*.tar", "parquet": "data-*.parquet"}[plan.request.format]
    lines += ["configs:", "- config_name: default", f"  data_files: {json.dumps(files)}"]
    features = features_yaml(feature_kinds(plan), plan.class_names, "  ")
    if plan.request.format == "imagefolder":  # its reader takes only what the configuration says
        lines += ["  features:", *features]
    lines += ["dataset_info:", "  config_name: default", "  features:", *features]
    return "\n".join(lines)


def _size_category(samples: int) -> str:
    """Return the Hub's name for the size of a dataset."""
    below = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for limit, name in below.items() if samples < limit), "10M<n<100M")


def _pattern(shards: int) -> str:
    """Return the brace pattern that matches all tar files."""
    return f"data-{{00000..{shards - 1:05d}}}-of-{shards:05d}.tar" if shards > 1 else "data-00000-of-00001.tar"
