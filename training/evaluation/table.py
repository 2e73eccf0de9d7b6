"""The numbers of an evaluation as text: tables of each feature space, and sentences about copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.evaluation.record import COMPARISONS, read_metrics

Part = Mapping[str, Any]
MEMORISES, SUSPICIOUS = 0.001, 0.05  # p-values below which the text says so; see docs/evaluation.md
_TRAINED = (
    "The generator was trained against a discriminator that uses the features of this space, so it has learnt to "
    "score well here: these numbers overestimate the quality of the images. Compare generators in another space."
)
_INDEPENDENT = (
    "The discriminator did not use this space. But lite0, lite1 and lite2 are related: networks of one family, trained on "
    "the same photographs."
)
_UNKNOWN = "The bundle does not say whether the generator was trained by the features of this space."


@dataclass(frozen=True)
class SpaceTable:
    """The numbers in one feature space."""

    space: str
    remark: str  # whether the space was used in training
    rows: list[list[str]]  # the header, then a row for each metric, with a column for each comparison
    class_rows: list[list[str]]  # the same with columns for the classes; empty without classes


def space_tables(metrics: Part, discriminator_space: str | None = None) -> list[SpaceTable]:
    """Make a table for each space. Metrics that were not measured have no row.

    Args:
        metrics: metrics.json of any version.
        discriminator_space: Result of `record.discriminator_space`, for metrics that do not contain it.
    """
    known = read_metrics(metrics)
    tables = []
    for name, space in known["spaces"].items():
        trained = space.get("trained_discriminator")
        if trained is None and discriminator_space is not None:
            trained = name == discriminator_space
        remark = _UNKNOWN if trained is None else _TRAINED if trained else _INDEPENDENT
        bandwidth = space.get("mmd_kernel", {}).get("bandwidth")
        lines = _lines(name, bandwidth)
        columns = _columns(known, space)
        classes = {
            f"{of_class}: {title}": part
            for of_class, parts in space.get("classes", {}).items()
            for title, part in _titled(_of_class(parts), short=True).items()
        }
        tables.append(SpaceTable(name, remark, _rows(lines, columns), _rows(lines, classes) if classes else []))
    return tables


def _of_class(parts: Mapping[str, Part]) -> Mapping[str, Part]:
    """The comparisons of a class to show: those with held-out images if there are any, as three columns are too many."""
    held_out = {name: part for name, part in parts.items() if name != "generated_training"}
    return held_out or parts


def copies(metrics: Part) -> list[str]:
    """Sentences on whether the generator copies training images, as far as it was tested, for readers without statistics."""
    known = read_metrics(metrics)
    if "holdout" not in known:
        paragraphs = [
            "No images were held out, so memorising was not tested: a distance to the training set cannot distinguish a "
            "good generator from one that copies."
        ]
    else:
        paragraphs = []
    for name, space in known["spaces"].items():
        numbers = space.get("copies", {})
        sentences = []
        if "memorising" in numbers:
            sentences.append(_memorising(known, numbers["memorising"]))
        if "membership" in numbers:
            sentences.append(_membership(numbers["membership"]))
        if "authenticity" in numbers:
            sentences.append(_authenticity(numbers))
        if sentences and not known.get("real_is_training_set"):
            sentences.append(
                "These numbers are about the real images that were compared, which are not known to be the training set: "
                "they say nothing about copies of training images."
            )
        if sentences:
            paragraphs.append(f"In {name}: {' '.join(sentences)}")
    return paragraphs


def path_length_text(metrics: Part) -> str:
    """A sentence on the perceptual path length; "" if it was not measured."""
    ppl = read_metrics(metrics).get("ppl")
    if not ppl:
        return ""

    def both(part: Part) -> str:
        return " and ".join(
            f"{part[sampling]:.4g} ± {part[f'{sampling}_error']:.2g} {place}"
            for sampling, place in (("end", "at the start of a path"), ("full", "anywhere along it"))
        )

    classes = "; ".join(f"{name}: {both(part)}" for name, part in ppl.get("classes", {}).items())
    return f"Perceptual path length in w, by {ppl['distance']}: {both(ppl)}{f' ({classes})' if classes else ''}."


def held_out_text(metrics: Part) -> str:
    """Sentences on the held-out images and their use; "" if there were none."""
    known = read_metrics(metrics)
    if "holdout" not in known:
        return ""
    held = known["holdout"]
    patients = f" of {_groups(held, 'patients or lesions')}" if held.get("patients") else ""
    name = f" ({held['name']})" if held.get("name") else ""
    digest = f", sha256 {held['sha256'][:16]}" if held.get("sha256") else ""
    text = f"Held out: {held['images']:,} real images{patients}{name}{digest}. "
    if known.get("real_is_training_set"):
        return text + (
            "The training set does not contain them, and the evaluation used them for these numbers only. Whether snapshots "
            "or options were chosen with them is not recorded."
        )
    return text + (
        "The real images that they are compared with are not the training set that the bundle names, so it is not known "
        "whether the generator was trained on the held-out ones."
    )


def _groups(held: Part, noun: str) -> str:
    """The number of patients or lesions, and how many of these are images of which neither is known."""
    alone = held.get("without_ids")  # missing in metrics of early versions
    return f"{held['patients']:,} {noun}" + (f", of which {alone:,} are images without an id" if alone else "")


def _columns(metrics: Part, space: Part) -> dict[str, Part]:
    """The comparisons of all images by title; those with other noise are last."""
    known = bool(metrics.get("real_is_training_set"))
    columns = _titled(space["comparisons"], training=known)
    for mode, parts in space.get("other_noise", {}).items():
        columns |= {f"{title}, {mode} noise": part for title, part in _titled(parts, training=known).items()}
    return columns


def _titled(parts: Mapping[str, Part], *, training: bool = True, short: bool = False) -> dict[str, Part]:
    trained = "training images" if training else "real images"
    if short:
        titles = dict.fromkeys(COMPARISONS[:2], "generated") | dict.fromkeys(COMPARISONS[2:], "real images instead")
    else:
        titles = {
            "generated_training": f"generated vs {trained}",
            "generated_holdout": "generated vs held-out images",
            "training_holdout": f"reference: {trained} vs held-out images",
            "holdout_training": f"reference: held-out images vs {trained}",
        }
    return {titles[name]: parts[name] for name in COMPARISONS if name in parts}


def fd_name(space: str) -> str:
    """Return the name of the Fréchet distance in a feature space; it is the FID only with `inception`."""
    return f"{'FID' if space == 'inception' else 'FD'}@{space}"


def _rows(lines: Sequence[tuple[str, Callable[[Part], str]]], columns: Mapping[str, Part]) -> list[list[str]]:
    rows = [[label, *(_cell(text, part) for part in columns.values())] for label, text in lines]
    return [["", *columns], *(row for row in rows if any(row[1:]))]


def _lines(space: str, bandwidth: float | None) -> list[tuple[str, Callable[[Part], str]]]:
    def share(key: str) -> Callable[[Part], str]:
        return lambda part: f"{part[key]:.3f}"

    def number(key: str) -> Callable[[Part], str]:
        return lambda part: f"{part[key]:.2f}"

    discrepancy = "CMMD" if space == "clip" else "MMD"
    width = "" if bandwidth is None else f" (bandwidth {bandwidth:.3g})"
    return [
        ("images on each side", _sizes),
        (fd_name(space), lambda part: _with_interval(part, "fd", 1)),
        (f"KID@{space} x 1000", lambda part: _with_interval(part, "kid", 1000)),
        (f"{discrepancy}@{space} x 1000{width}", lambda part: _with_interval(part, "mmd", 1000)),
        (f"precision@{space}", share("precision")),
        (f"recall@{space}", share("recall")),
        (f"density@{space}", share("density")),
        (f"coverage@{space}", lambda part: f"{part['coverage']:.3f} (expected {part['expected_coverage']:.3f})"),
        (f"alpha-precision@{space}", share("alpha_precision")),
        (f"beta-recall@{space}", share("beta_recall")),
        (f"FLD@{space}, of all images", number("fld")),
        (f"FLD generalisation gap@{space}, of all images", number("fld_gap")),
    ]


def _sizes(part: Part) -> str:
    if part["images"] == part["real_images"]:
        return f"{part['images']:,}"
    return f"{part['images']:,} vs {part['real_images']:,}"


def _with_interval(part: Part, key: str, factor: float) -> str:
    value, interval = factor * part[key], part.get(f"{key}_interval")
    if interval is None:  # measured during a training, or by an early version
        return f"{value:.4g}"
    return f"{value:.4g} [{factor * interval[0]:.4g}, {factor * interval[1]:.4g}]"


def _memorising(metrics: Part, test: Part) -> str:
    held = metrics["holdout"]
    of_patients = f" ({_groups(held, 'groups by patient or lesion')})" if held.get("patients") else ""
    numbers = (
        f"{test['nearer_train']:.1%} of the generated images are nearer to one of the {metrics['real_images']:,} real "
        f"images than to any of the {held['images']:,} held-out ones{of_patients}; {test['expected_nearer_train']:.1%} "
        f"are expected of a generator that does not memorise (p = {test['p_value']:.2g}, "
        f"{test['permutations']:,} permutations)."
    )
    if not metrics.get("real_is_training_set"):
        verdict = "Whether it memorises is not known: the real images are not the set that it was trained on."
    elif test["p_value"] < MEMORISES:
        verdict = "It memorises: its images are significantly nearer to the training images than to held-out images."
    elif test["p_value"] < SUSPICIOUS:
        verdict = "It may memorise: measure again with more held-out images or another seed."
    else:
        verdict = "No sign of memorising; the test can miss a few copies among many images."
    return f"{verdict} {numbers}"


def _membership(attack: Part) -> str:
    area, recall = attack["auc"], attack["found_at_1_percent"]
    return (
        "Membership attack (a real image that lies near a generated one is assumed to be a training image): AUC "
        f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}], where guessing has 0.5; at 1 % false alarms it "
        f"finds {recall['value']:.1%} [{recall['low']:.1%}, {recall['high']:.1%}] of the training images, where "
        f"guessing finds {attack.get('expected_at_1_percent', 0.01):.1%}."
    )


def _authenticity(numbers: Part) -> str:
    held = numbers.get("holdout_authenticity")
    reference = "" if held is None else f"; held-out images instead of generated ones have {held:.3f}"
    return f"Authenticity {numbers['authenticity']:.3f}{reference}."


def _cell(text: Callable[[Part], str], part: Part) -> str:
    try:
        return text(part)
    except KeyError:
        return ""
