"""Tests that foreign text in messages is printable, on one line and short."""

from __future__ import annotations

import pytest

from dermis.errors import escape, quote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naevus, naïve 名", "naevus, naïve 名"),
        ("\x1b[2Jline\nline\r", r"\x1b[2Jline\nline\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udc80 \x9b", r"\udc80 \x9b"),
        (ValueError("a\tb"), r"a\tb"),
    ],
)
def test_unprintable_characters_are_escaped(text: object, expected: str) -> None:
    assert escape(text) == expected


def test_long_text_is_cut() -> None:
    for shown in (escape("a" * 10**7), escape("\x1b" * 300), quote("a" * 10**7), quote(b"\x1b" * 10**7)):
        assert len(shown) <= 200 and shown.rstrip("'").endswith("...") and shown.isprintable()
    assert escape("a" * 200) == "a" * 200


def test_quoted_values_are_literals_of_bounded_size() -> None:
    assert quote("it's") == '"it\'s"'
    assert quote(None) == "None" and quote(0.5) == "0.5" and quote([1, 3, 3, 1]) == "[1, 3, 3, 1]"
    assert quote(10**5000) == "a number of 16,610 bits" and quote([10**5000]) == "[a number of 16,610 bits]"
    nested: list[object] = ["\x1b" * 1000]
    for _ in range(100):
        nested = [nested] * 1000
    assert len(quote(nested)) <= 200 and "\x1b" not in quote(nested)
