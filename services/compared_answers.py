"""The answers on uploaded images in the jobs database, so that all replicas of the service repeat the same ones.

An answer is stored with the fingerprint of its image, in a transaction that holds the lock of its tenant. So the answers of a
tenant can be read in the order of their numbers, and a replica reads each of them once. `services.gateway.compared` decides
which answer is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from dermis.perceptual_hash import Hashes

metadata = sa.MetaData()

_answers = sa.Table(
    "dermis_compared",
    metadata,
    # Numbers of removed rows must not be used again: replicas read the rows above the last number that they know.
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.String(63), nullable=False),
    sa.Column("index_digest", sa.String(80), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),  # seconds since 1970
    sa.Column("fingerprint", sa.LargeBinary(32), nullable=False),
    sa.Column("distance", sa.Float, nullable=False),
    sa.Column("radius", sa.Float, nullable=False),
    sa.Index("ix_dermis_compared_tenant", "tenant", "number"),
    sqlite_autoincrement=True,
)

_ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class Answer:
    """The answer on one image.

    Attributes:
        index: Digest of the index with which the image was compared.
        created_at: When it was given first, seconds since 1970.
        mark: Fingerprint [4] of the image.
        distance: Distance to the nearest training image.
        radius: Radius of that training image.
    """

    index: str
    created_at: float
    mark: Hashes
    distance: float
    radius: float


def answers_after(connection: sa.Connection, tenant: str, number: int, since: float) -> Iterator[tuple[int, Answer]]:
    """The answers of a tenant that have higher numbers, in the order of their numbers.

    Args:
        connection: A connection to the jobs database.
        tenant: The tenant.
        number: Only answers with higher numbers.
        since: Only answers that were given later, seconds since 1970.
    """
    query = (
        sa.select(_answers)
        .where(_answers.c.tenant == tenant, _answers.c.number > number, _answers.c.created_at > since)
        .order_by(_answers.c.number)
    )
    for rows in connection.execute(query).partitions(_ROWS_AT_A_TIME):
        for row in rows:
            mark = np.frombuffer(row.fingerprint, "<u8").astype(np.uint64)
            yield row.number, Answer(row.index_digest, row.created_at, mark, row.distance, row.radius)


def add_answers(connection: sa.Connection, tenant: str, answers: Sequence[Answer]) -> int:
    """Store answers and return the number of the last one. The tenant must be locked (`services.jobs.counters`)."""
    rows = [
        {
            "tenant": tenant,
            "index_digest": answer.index,
            "created_at": answer.created_at,
            "fingerprint": answer.mark.astype("<u8").tobytes(),
            "distance": answer.distance,
            "radius": answer.radius,
        }
        for answer in answers
    ]
    connection.execute(sa.insert(_answers), rows)
    last = sa.select(sa.func.max(_answers.c.number)).where(_answers.c.tenant == tenant)
    return int(connection.execute(last).scalar_one())


def remove_answers(connection: sa.Connection, until: float) -> int:
    """Remove the answers of all tenants that were given until this time, and return their number."""
    return connection.execute(sa.delete(_answers).where(_answers.c.created_at <= until)).rowcount
