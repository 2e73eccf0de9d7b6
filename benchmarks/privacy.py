"""What the privacy audit finds in datasets with known disclosures: `python -m benchmarks.privacy [--json] --members DIR ...`.

Samples of a bundle are audited as they are, with 2 % of them replaced by slightly changed members, and with half of them
replaced. A change is a brightness of 105 % and a JPEG of quality 75. The feature spaces are those of --extractor and the
pixels, without that of the bundle's classifier. Features of members, held-out images and samples are computed once for all
audits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.bundle import open_bundle, trained_on
from dermis.privacy.attacks import Space
from dermis.privacy.audit import Evidence, PrivacyAudit, Subject, run_audit
from dermis.privacy.questions import Attribute
from dermis.synthesizer import Synthesizer
from training.data.isic import load_isic
from training.evaluation.copies import recompressed
from training.evaluation.features import labels_in_proportion, real_features
from training.evaluation.holdout import groups_of, without_ids
from training.evaluation.privacy import bundle_labels, pixel_space
from training.evaluation.sets import Generation, generated_batches, load_spaces

SHARES = {"samples": 0.0, "2 % changed members": 0.02, "half changed members": 0.5}
_RULES = ("samples-average", "samples-few", "disclosures", "epsilon", "singling-out", "linkability", "inference")


def changed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Brighten an image by 5 % and save it as JPEG."""
    return recompressed(np.clip(image * 1.05, 0, 255).astype(np.uint8), 75)


def measure(arguments: argparse.Namespace) -> dict[str, PrivacyAudit]:
    """Audit the three datasets."""
    bundle = open_bundle(arguments.bundle)
    size = bundle.generator.img_resolution
    extractors = [*load_spaces(arguments.extractor, torch.device("cpu"))[0], pixel_space()]
    members = load_isic(arguments.data, size, metadata=arguments.members, cache=arguments.cache)
    others = load_isic(arguments.data, size, metadata=arguments.non_members, cache=arguments.cache)
    groups = groups_of(members, others)
    labels = labels_in_proportion(bundle_labels(bundle, members), arguments.count)
    with Synthesizer(bundle, device="cpu") as synthesizer:
        generation = Generation(labels, 0, 1.0, ("random",))
        samples = np.concatenate(list(generated_batches(synthesizer, generation, "random")))
    rng = np.random.default_rng(0)
    copied = rng.permutation(len(members.labels))[: round(max(SHARES.values()) * arguments.count)]
    copies = np.stack([changed(members.images[i]) for i in copied])
    features = [
        (
            space.name,
            real_features(members, space, arguments.cache),
            real_features(others, space, arguments.cache),
            space.over(samples[i : i + 32] for i in range(0, len(samples), 32)),
            space.over(copies[i : i + 32] for i in range(0, len(copies), 32)),
        )
        for space in extractors
    ]
    real = [each.class_names[label] for each in (members, others) for label in each.labels]
    results = {}
    for name, share in SHARES.items():
        count = round(share * arguments.count)
        replaced = rng.permutation(arguments.count)[:count]
        classes = np.array([bundle.class_names[label] for label in labels])
        classes[replaced] = [members.class_names[label] for label in members.labels[copied[:count]]]
        spaces = []
        for space, of_members, of_others, of_samples, of_copies in features:
            generated = of_samples.copy()
            generated[replaced] = of_copies[:count]
            spaces.append(Space(space, of_members, of_others, generated))
        planted = {space: of_copies[-round(0.02 * len(members.labels)) :] for space, *_, of_copies in features}
        subject = Subject(
            scope="dataset",
            bundle_name=bundle.name,
            bundle_digest=bundle.digest,
            dataset_digest=None,
            generated=arguments.count,
            members=len(members.labels),
            member_patients=None if groups is None else len(set(groups[: len(members.labels)])),
            members_sha256=members.sha256,
            members_are_training_set=trained_on(bundle.provenance) == members.sha256,
            non_members=len(others.labels),
            non_member_patients=None if groups is None else len(set(groups[len(members.labels) :])),
            non_members_sha256=others.sha256,
            spaces={space.name: space.identity for space in extractors},
            seed=0,
            members_without_ids=without_ids(members),
            non_members_without_ids=without_ids(others),
            dataset_of_bundle=True,
        )
        patients = groups if groups is not None else [str(i) for i in range(len(real))]
        evidence = Evidence(spaces, patients, (), [Attribute("class", real, classes.tolist())], planted)
        results[name] = run_audit(subject, evidence)
    return results


def row(name: str, audit: PrivacyAudit) -> list[str]:
    """One row of the table."""
    strongest = max(audit.attacks, key=lambda attack: attack.auc.value)
    few = max((attack.recognised[0].share for attack in audit.attacks), key=lambda share: share.value if share else 0)
    near = max(audit.disclosures, key=lambda each: each.excess.low if each.excess else -1)
    statuses = {outcome.rule: outcome.status for outcome in audit.outcomes}
    return [
        name,
        audit.verdict.status,
        f"{strongest.auc.value:.3f} [{strongest.auc.low:.3f}, {strongest.auc.high:.3f}]",
        f"{audit.control.auc.value:.3f}",
        "" if few is None else f"{few.value:.1%}",
        f"{near.members_near:,} / {near.expected_by_chance:.1f} ({near.space})",
        f"{min(attack.adjusted_few for attack in audit.attacks):.2g}",
        *(statuses[rule] for rule in _RULES),
    ]


def main() -> None:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="bundles/demo")
    parser.add_argument("--data", type=Path, required=True, help="folder of the real images")
    parser.add_argument("--members", type=Path, required=True, help="CSV of the training images")
    parser.add_argument("--non-members", type=Path, required=True, help="CSV of the held-out images")
    parser.add_argument("--extractor", action="append", default=[])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--cache", type=Path, default=Path(".dermis/cache"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.json:
        document: dict[str, Any] = {name: audit.to_json() for name, audit in results.items()}
        print(json.dumps(document, indent=2))
        return
    header = ["dataset", "verdict", "highest AUC", "control", "found at 1 %", "near / by chance", "p few", *_RULES]
    for line in (header, ["---"] * len(header), *(row(name, audit) for name, audit in results.items())):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
