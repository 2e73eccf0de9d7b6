"""Map values of a table, or names of folders, to classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dermis.errors import DataError, escape, quote
from training.data.diagnoses import BENIGN, MALIGNANT, binary_class, is_no, is_yes, other_malignancy

_NO_CLASS = frozenset({"", "na", "n/a", "nan", "none", "null"})
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9 ._-]+")  # characters that class names in a bundle cannot have
_LEVELS = " / "  # between the values of an image, from general to specific
_MAX_LISTED_VALUES = 10
_MAX_LISTED_IN_NOTE = 5
_MAX_NAME_LENGTH = 64


@dataclass(frozen=True)
class ClassOrigin:
    """Class of the images with one value in a column."""

    column: str
    value: str
    class_name: str  # "" for no class
    count: int  # number of these images


@dataclass(frozen=True)
class ClassRules:
    """Rules that map values to classes."""

    where: Path
    column: str
    binary: bool  # classes are malignant (melanoma) and benign
    has_truth_values: bool  # the column states the truth: 0 means benign, 1 malignant
    mapping: Mapping[str, str]  # value -> class ("" for none); takes precedence over the other rules


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """Parse texts of the form VALUE=CLASS. With an empty class, images have no class.

    Raises:
        DataError: A text has another form, or a value has two classes.
    """
    mapping: dict[str, str] = {}
    for text in texts:
        value, equals, class_name = text.rpartition("=")
        if not equals or not value.strip():
            raise DataError(f"--map: {text!r} does not have the form VALUE=CLASS")
        key = _folded(value)
        if mapping.setdefault(key, class_name.strip()) != class_name.strip():
            raise DataError(f"--map: {value.strip()!r} is mapped twice")
    return mapping


def class_of(values: Sequence[Sequence[str]], rules: ClassRules) -> tuple[tuple[str, ...], tuple[ClassOrigin, ...]]:
    """Determine the class of each image.

    Values are compared without regard to case and to outer or repeated spaces. An image with several values (a diagnosis from
    general to specific) is malignant if any of them means melanoma.

    Args:
        values: One or more values of each image.
        rules: The rules.

    Returns:
        The class of each image ("" for none), and the number of images by value and class.

    Raises:
        DataError: A value is not understood, or two values would become one class by accident.
    """
    counts = Counter(tuple(_spaced(value) for value in row) for row in values)
    _check_mapping(rules)
    unmapped = {value for row in counts for value in row if _folded(value) not in rules.mapping}
    truths = {value for value in unmapped if is_yes(value) or is_no(value)}
    others = sorted(value for value in unmapped - truths if _is_number(value))
    if rules.has_truth_values and truths and others:
        raise DataError(
            f"{rules.where}: {rules.column} mixes {quote(others[0])} with {', '.join(map(quote, sorted(truths)))}. It is read "
            "as benign and malignant only if it has no other numbers; state the classes with --map VALUE=CLASS"
        )
    names = _binary_names(counts, rules) if rules.binary else _plain_names(counts, rules)
    origins: Counter[tuple[str, str]] = Counter()
    for row, count in counts.items():
        origins[_LEVELS.join(dict.fromkeys(filter(None, row))), names[row]] += count
    listed = [ClassOrigin(rules.column, value, name, count) for (value, name), count in origins.items()]
    listed.sort(key=lambda each: (each.class_name == "", each.class_name, -each.count, each.value))
    return tuple(names[tuple(_spaced(value) for value in row)] for row in values), tuple(listed)


def benign_but_malignant(origins: Sequence[ClassOrigin]) -> str:
    """Describe the images of the class benign with another cancer than melanoma or a precursor of one; "" if there are none."""
    parts = []
    for kind, text in (("cancer", "another cancer than melanoma"), ("precancer", "a precursor or an uncertain lesion")):
        counts: Counter[str] = Counter()
        for origin in origins:
            if origin.class_name == BENIGN and other_malignancy(origin.value) == kind:
                counts[_most_specific(origin.value)] += origin.count
        if counts:
            listed = ", ".join(
                f"{quote(value)} ({count:,})" for value, count in counts.most_common(_MAX_LISTED_IN_NOTE)
            )
            more = f" and {len(counts) - _MAX_LISTED_IN_NOTE} more" if len(counts) > _MAX_LISTED_IN_NOTE else ""
            parts.append(f"{counts.total():,} images of {text}: {listed}{more}")
    if not parts:
        return ""
    return f"the class benign has {'; and '.join(parts)}. Leave such images out with --map VALUE= and --skip-unlabelled"


def _most_specific(value: str) -> str:
    """The last level of a diagnosis, without the columns that repeat all levels ("Malignant::...")."""
    levels = value.split(_LEVELS)
    return next((level for level in reversed(levels) if "::" not in level), levels[-1])


def contradiction(classes: Sequence[str], diagnoses: Sequence[str]) -> list[int]:
    """Indices of the images whose class contradicts their diagnosis. An empty class or diagnosis contradicts nothing."""
    return [i for i, pair in enumerate(zip(classes, diagnoses, strict=True)) if all(pair) and pair[0] != pair[1]]


def _check_mapping(rules: ClassRules) -> None:
    for value, name in rules.mapping.items():
        if rules.binary and name not in (MALIGNANT, BENIGN, ""):
            raise DataError(
                f"--map: {escape(value)}={escape(name)}: with two classes the class must be malignant, benign or empty"
            )
        if name and _allowed(name) != name:
            raise DataError(
                f"--map: {value}={name}: class names can have only letters (a to z), digits, space, dot, dash and underscore"
            )


def _binary_names(counts: Mapping[tuple[str, ...], int], rules: ClassRules) -> dict[tuple[str, ...], str]:
    names: dict[tuple[str, ...], str] = {}
    unknown: Counter[str] = Counter()
    for row, count in counts.items():
        mapped = [rules.mapping[_folded(value)] for value in row if _folded(value) in rules.mapping]
        if mapped:
            names[row] = mapped[-1]  # the most specific one
            continue
        answers = {value: _binary_value(value, rules, len(row) > 1) for value in row}
        doubtful = [value for value, answer in answers.items() if answer is None]
        if MALIGNANT in answers.values():
            names[row] = MALIGNANT
        elif BENIGN in answers.values() and not any("mel" in value.lower() for value in doubtful):
            names[row] = BENIGN
        elif doubtful:
            unknown[doubtful[-1]] += count
        else:
            names[row] = ""
    if unknown:
        raise DataError(_unknown(unknown, rules))
    return names


def _binary_value(value: str, rules: ClassRules, one_of_several: bool) -> str | None:
    if _folded(value) in _NO_CLASS:
        return ""
    if is_yes(value) or is_no(value):
        return (MALIGNANT if is_yes(value) else BENIGN) if rules.has_truth_values else None
    if one_of_several and _folded(value) == MALIGNANT:  # the most general level of the Archive: can be any cancer
        return ""
    return binary_class(value)


def _unknown(unknown: Mapping[str, int], rules: ClassRules) -> str:
    listed = sorted(unknown.items(), key=lambda each: (-each[1], each[0]))
    shown = ", ".join(f"{quote(value)} ({count:,})" for value, count in listed[:_MAX_LISTED_VALUES])
    more = f" and {len(listed) - _MAX_LISTED_VALUES} more" if len(listed) > _MAX_LISTED_VALUES else ""
    example = escape(listed[0][0])
    return (
        f"{rules.where}: {rules.column}: cannot decide whether these values mean melanoma: {shown}{more}; state their "
        f'class with --map "{example}=benign", --map "{example}=malignant" or, for no class, --map "{example}="'
    )


def _plain_names(counts: Mapping[tuple[str, ...], int], rules: ClassRules) -> dict[tuple[str, ...], str]:
    """Class of each row of values without the binary rule.

    Spellings that differ in case or spaces are one class, in lower case. Characters that bundles do not allow are removed.
    """
    spellings: dict[str, set[str]] = {}
    for row in counts:
        for value in row:
            spellings.setdefault(_folded(value), set()).add(value)
    by_value: dict[str, str] = {}
    for folded, variants in spellings.items():
        if folded in rules.mapping:
            by_value[folded] = rules.mapping[folded]
        elif folded in _NO_CLASS:
            by_value[folded] = ""
        elif rules.has_truth_values and (is_yes(folded) or is_no(folded)):
            by_value[folded] = MALIGNANT if is_yes(folded) else BENIGN
        elif _is_number(folded) and not float(folded).is_integer():
            raise DataError(
                f"{rules.where}: {rules.column}: {quote(folded)} is a measurement or probability, not a class; choose another "
                "column with --class-column, or use --map"
            )
        else:
            by_value[folded] = _allowed(next(iter(variants)) if len(variants) == 1 else folded)
            if not by_value[folded]:
                raise DataError(
                    f"{rules.where}: {rules.column}: {quote(folded)} cannot be the name of a class; state a class with --map"
                )
    taken: dict[str, str] = {}
    for folded, name in sorted(by_value.items()):
        other = taken.setdefault(name.casefold(), folded)
        intended = {folded, other} & rules.mapping.keys() or not name or name in (BENIGN, MALIGNANT)
        if other != folded and not intended:
            raise DataError(
                f"{rules.where}: {rules.column}: {quote(other)} and {quote(folded)} would both be the class {name}; "
                f'distinguish them with --map "{escape(folded)}=CLASS"'
            )
    names = {row: by_value[_folded(row[-1])] for row in counts}
    return _one_spelling(names)


def _one_spelling(names: dict[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Make names that differ in case one class: `Benign` of one value, and `benign` of a mapped value or a number."""
    variants: dict[str, set[str]] = {}
    for name in names.values():
        variants.setdefault(name.casefold(), set()).add(name)
    return {row: name if len(variants[name.casefold()]) == 1 else name.casefold() for row, name in names.items()}


def _allowed(value: str) -> str:
    plain = unicodedata.normalize("NFKD", value.replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return " ".join(_NOT_IN_NAMES.sub(" ", plain).split()).lstrip("._- ")[:_MAX_NAME_LENGTH].rstrip()


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[-+]?\d+(\.\d+)?", value) is not None


def _spaced(value: str) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split())


def _folded(value: str) -> str:
    return _spaced(value).casefold()
