"""Edge cases: images that a classifier gets wrong, is unsure of, or that lie between the clusters of the classes.

Two numbers measure how well an image fits its class: 1 deep inside, 0.5 on the boundary, 0 deep in the other class.

    agreement   the share of the image's own class among its k nearest neighbours by cosine in the classifier's feature
                space. The weight of a neighbour is one over the number of images of its class, for the rarer class
    own         sigmoid(+-(logit p - logit threshold)) of the calibrated probability p, with + for label 1: the probability of
                the image's own class, shifted so that it is 0.5 at the threshold

score = 1 - (agreement + own) / 2. Neighbours are never of the same patient (or lesion).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.classifier.scores import sigmoid
from dermis.errors import DataError, quote
from dermis.explain.nearest import nearest_by_cosine
from dermis.imaging import Images, contact_sheet

if TYPE_CHECKING:
    from dermis.explain.embeddings import Embedded, Item

MISCLASSIFIED, THRESHOLD, NEIGHBOURS = "misclassified", "near the threshold", "between clusters"
COLUMNS = (
    "id",
    "kind",
    "part",
    "source",
    "class",
    "predicted",
    "calibrated",
    "threshold",
    "own",
    "agreement",
    "score",
    "reasons",
    "neighbours",
    "similarities",
    "seed",
    "index",
    "label",
)
SHEET_NEIGHBOURS = 7
_EDGE = 3  # width in px of the frame of each picture, in the colour of its class
_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
)  # colours of labels 0 and 1: blue and vermilion, which colour-blind people can distinguish


@dataclass(frozen=True)
class Criteria:
    """Criteria of an edge case.

    Attributes:
        neighbours: Number of nearest neighbours that are compared.
        agreement: An image lies between clusters if at most this share of its neighbours is of its class.
        odds: An image is near the threshold if its odds are within this factor of those of the threshold.
    """

    neighbours: int = 15
    agreement: float = 0.6
    odds: float = 1.5

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise DataError(f"neighbours: must be at least 1; got {self.neighbours}")
        if not 0 <= self.agreement <= 1:
            raise DataError(f"agreement: must be from 0 to 1; got {self.agreement:g}")
        if not self.odds >= 1:
            raise DataError(f"odds: must be at least 1; got {self.odds:g}")


@dataclass(frozen=True)
class EdgeScores:
    """Scores of N images: float64 [N], the three reasons bool [N], and indices and similarities of neighbours [N, k]."""

    agreement: NDArray[np.float64]
    own: NDArray[np.float64]
    misclassified: NDArray[np.bool_]
    near_threshold: NDArray[np.bool_]
    between_clusters: NDArray[np.bool_]
    neighbours: NDArray[np.int64]
    similarities: NDArray[np.float32]

    @property
    def score(self) -> NDArray[np.float64]:
        """[N]: 1 - (agreement + own) / 2."""
        return 1 - (self.agreement + self.own) / 2

    @property
    def is_edge(self) -> NDArray[np.bool_]:
        """[N]: whether an image is an edge case."""
        return self.misclassified | self.near_threshold | self.between_clusters

    @property
    def order(self) -> NDArray[np.int64]:
        """Indices of the edge cases, with the highest score first."""
        return np.array([i for i in np.argsort(-self.score, kind="stable") if self.is_edge[i]], dtype=np.int64)

    def reasons(self, i: int) -> tuple[str, ...]:
        """Return why image i is an edge case; empty if it is not one."""
        reasons = (
            (MISCLASSIFIED, self.misclassified),
            (THRESHOLD, self.near_threshold),
            (NEIGHBOURS, self.between_clusters),
        )
        return tuple(reason for reason, holds in reasons if holds[i])


def edge_scores(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    calibrated: NDArray[np.float64],
    threshold: float,
    criteria: Criteria,
    *,
    groups: Sequence[str] | None = None,
) -> EdgeScores:
    """Score images.

    Args:
        features: Features [N, D] of the classifier.
        labels: Labels [N], 0 or 1.
        calibrated: Calibrated probabilities [N] of label 1.
        threshold: Threshold of the calibrated probability.
        criteria: Criteria of an edge case.
        groups: Patient or lesion of each image. Images of one group are not neighbours of each other.

    Raises:
        DataError: There are too few images, or images of one class only.
    """
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        raise DataError("edge cases lie between two classes; there are images of one only")
    try:
        similarities, neighbours = nearest_by_cosine(features, criteria.neighbours, groups=groups)
    except ValueError as error:
        raise DataError(f"--neighbours: {error} other images; choose a smaller number or add images") from None
    weight = 1.0 / counts
    weights = weight[labels[neighbours]]
    same = labels[neighbours] == labels[:, None]
    agreement = (weights * same).sum(axis=1) / weights.sum(axis=1)
    margin = _logit(calibrated) - float(
        _logit(np.array([threshold]))[0]
    )  # log of the ratio of the odds and those of the threshold
    own = sigmoid(np.where(labels == 1, margin, -margin))
    return EdgeScores(
        agreement=agreement,
        own=own,
        misclassified=(calibrated >= threshold) != (labels == 1),
        near_threshold=np.abs(margin) <= math.log(criteria.odds) + 1e-12,
        between_clusters=agreement <= criteria.agreement,
        neighbours=neighbours,
        similarities=similarities,
    )


def labels_of(items: Sequence[Item], class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the label, 0 or 1, of each image. Raises DataError if the class of one is not a class of the classifier."""
    for item in items:
        if item.class_name not in class_names:
            names = " nor ".join(class_names)
            raise DataError(f"{item.id}: its class {quote(item.class_name or '(unknown)')} is neither {names}")
    return np.array([class_names.index(item.class_name) for item in items], dtype=np.int64)


def edge_case_rows(
    embedded: Embedded, scores: EdgeScores, class_names: tuple[str, str], threshold: float
) -> list[dict[str, str]]:
    """Make a row of COLUMNS for each edge case, with the highest score first."""
    rows = []
    for i in scores.order:
        item, p = embedded.items[i], float(embedded.calibrated[i])
        rows.append(
            {
                "id": item.id,
                "kind": item.kind,
                "part": item.part,
                "source": item.source,
                "class": item.class_name,
                "predicted": class_names[int(p >= threshold)],
                "calibrated": f"{p:.6f}",
                "threshold": f"{threshold:.6f}",
                "own": f"{scores.own[i]:.4f}",
                "agreement": f"{scores.agreement[i]:.4f}",
                "score": f"{scores.score[i]:.4f}",
                "reasons": "; ".join(scores.reasons(int(i))),
                "neighbours": "; ".join(embedded.items[j].id for j in scores.neighbours[i]),
                "similarities": "; ".join(f"{s:.4f}" for s in scores.similarities[i]),
                "seed": "" if item.seed is None else str(item.seed),
                "index": "" if item.index is None else str(item.index),
                "label": "" if item.label is None else str(item.label),
            }
        )
    return rows


def to_csv(rows: Sequence[dict[str, str]]) -> str:
    """Write rows of COLUMNS as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str, where: str) -> list[dict[str, str]]:
    """Read rows that `to_csv` wrote.

    Raises:
        DataError: A column is missing, or there are no rows.
    """
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows:
        raise DataError(f"{where}: lists no edge cases")
    if absent := [column for column in COLUMNS if rows[0].get(column) is None]:
        raise DataError(f"{where}: has no column {absent[0]}; give a CSV of `dermis explain edge-cases`")
    return rows


def edge_case_sheet(embedded: Embedded, scores: EdgeScores, class_names: Sequence[str], most: int) -> Images:
    """Make a picture with a row for each of the first `most` edge cases: the case and its neighbours, framed by class."""
    labels = labels_of(embedded.items, class_names)
    shown = SHEET_NEIGHBOURS if scores.neighbours.shape[1] >= SHEET_NEIGHBOURS else scores.neighbours.shape[1]
    cells = [j for i in scores.order[:most] for j in (i, *scores.neighbours[i, :shown])]
    if not cells:
        raise DataError("there are no edge cases to show")
    pictures = np.stack([_framed(embedded.thumbnails[j], _COLOURS[labels[j]]) for j in cells])
    return contact_sheet(pictures, shown + 1)


def _framed(image: Images, colour: tuple[int, int, int]) -> Images:
    side = image.shape[0] + 2 * _EDGE
    framed = np.full((side, side, 3), colour, np.uint8)
    framed[_EDGE:-_EDGE, _EDGE:-_EDGE] = image
    return framed


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute log odds. Those of 0 and 1 are those of the nearest other float64."""
    inside = p.clip(1e-15, 1 - 1e-15)
    odds: NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return odds
