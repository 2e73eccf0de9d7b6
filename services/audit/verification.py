"""Check an audit trail: changed, removed, inserted and moved entries, and entries that are missing at either end."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.audit.trail import GENESIS, Entry, Head, Snapshot, removed_by, sign

_MAX_PROBLEMS = 20


@dataclass
class Verification:
    """The result of a check.

    Attributes:
        entries: Number of entries.
        first: Number of the first one; None if there is none.
        last: The last one; None if there is none.
        cut: The mark of entries that were removed by `dermis audit cut`, if the trail begins after them.
        unsigned: Number of entries without a signature.
        signatures_checked: Whether there was a key to check signatures with.
        unchecked: Number of entries whose own content was not checked, because the hash of the entry before is not known.
        problems: What is wrong, the first 20 findings.
        more: Number of further findings.
    """

    entries: int = 0
    first: int | None = None
    last: Head | None = None
    cut: Entry | None = None
    unsigned: int = 0
    signatures_checked: bool = False
    unchecked: int = 0
    problems: list[str] = field(default_factory=list)
    more: int = 0

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def add(self, problem: str) -> None:
        """Add a finding."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more += 1


def verify(
    snapshot: Snapshot, *, key: bytes | None = None, unsigned_until: int = 0, known: Sequence[Head | Entry] = ()
) -> Verification:
    """Check the whole trail of a database.

    Args:
        snapshot: The trail, without limits of time.
        key: Checks signatures.
        unsigned_until: Number of the last entry that was written before the service had the key.
        known: What was kept elsewhere: numbers and hashes of earlier heads, or entries of the log.
    """
    result = Verification()
    cut = removed_by(snapshot.cut)
    start, previous = (1, GENESIS) if cut is None else (cut.number + 1, cut.hash)
    result.cut = snapshot.cut if cut is not None else None
    _check_chain(result, snapshot.entries, start, previous, key, unsigned_until, known)
    if cut is not None:
        _compare(result, known, cut)
    head = snapshot.head
    last = result.last or Head(start - 1, previous)
    if head is None:
        result.add("the head of the trail was removed, so entries at the end can be missing")
    elif head.number > last.number:
        result.add(f"{_range(last.number + 1, head.number)} missing at the end: the head is entry {head.number}")
    elif head.number < last.number:
        result.add(f"entry {last.number} was added after the head, which is entry {head.number}")
    elif head.hash != last.hash:
        result.add(f"the head has another hash than entry {last.number}, so entries at the end were replaced")
    _check_missing(result, known, last)
    return result


def verify_part(
    entries: Iterable[Entry],
    previous: str | None,
    *,
    key: bytes | None = None,
    unsigned_until: int = 0,
    known: Sequence[Head | Entry] = (),
) -> Verification:
    """Check consecutive entries, such as those of an export. What precedes and follows them is not checked.

    Args:
        entries: The entries, oldest first.
        previous: Hash of the entry before the first one; None if it is not known.
        key: Checks signatures.
        unsigned_until: As for `verify`.
        known: As for `verify`.
    """
    result = Verification()
    _check_chain(result, entries, None, previous, key, unsigned_until, known)
    return result


def _check_chain(
    result: Verification,
    entries: Iterable[Entry],
    start: int | None,
    previous: str | None,
    key: bytes | None,
    unsigned_until: int,
    known: Sequence[Head | Entry],
) -> None:
    expected = start
    result.signatures_checked = key is not None
    kept = {each.number: each for each in known}
    for entry in entries:
        if result.first is None and entry.number == 1:
            previous = GENESIS
        if expected is not None and entry.number != expected:
            if entry.number > expected:
                where = " at the beginning" if result.first is None else ""
                result.add(f"{_range(expected, entry.number - 1)} missing{where}")
            else:
                result.add(f"entry {entry.number} stands where entry {expected} is expected")
            previous = None
        if previous is None:
            result.unchecked += 1
        elif entry.chained_hash(previous) != entry.hash:
            result.add(f"entry {entry.number} does not match its hash: it was changed, inserted or moved")
        if entry.number in kept:
            _compare(result, [kept[entry.number]], Head(entry.number, entry.hash))
            _compare_content(result, kept[entry.number], entry)
        _check_signature(result, entry, key, unsigned_until)
        result.entries += 1
        if result.first is None:
            result.first = entry.number
        result.last = Head(entry.number, entry.hash)
        expected, previous = entry.number + 1, entry.hash


def _check_signature(result: Verification, entry: Entry, key: bytes | None, unsigned_until: int) -> None:
    if entry.signature is None:
        result.unsigned += 1
        if key is not None and entry.number > unsigned_until:
            result.add(f"entry {entry.number} is not signed")
    elif key is not None and not hmac.compare_digest(sign(key, entry.hash), entry.signature):
        result.add(f"the signature of entry {entry.number} does not match: it was not written with this key")


def _compare(result: Verification, known: Sequence[Head | Entry], actual: Head) -> None:
    for each in known:
        if each.number == actual.number and each.hash != actual.hash:
            result.add(f"entry {each.number} has another hash than the one that was kept: the trail was rewritten")


def _compare_content(result: Verification, kept: Head | Entry, entry: Entry) -> None:
    if isinstance(kept, Entry) and kept.hash == entry.hash and kept != entry:
        result.add(
            f"entry {entry.number} differs from the line that was kept, although the hashes are equal: one was changed"
        )


def _check_missing(result: Verification, known: Sequence[Head | Entry], last: Head) -> None:
    """Report entries that were kept elsewhere and follow the last one. Those before a cut cannot be compared."""
    late = sorted(each.number for each in known if each.number > last.number)
    if late:
        result.add(f"entry {late[-1]}, which was kept, is missing: entries at the end were removed")


def _range(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"
