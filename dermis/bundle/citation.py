"""BibTeX of bundles and of what they stand on: entries, and the section of a bundle's card."""

from __future__ import annotations

import re
from collections.abc import Mapping

METHOD_KEY, SOFTWARE_KEY = "carrascolimeros2022gan", "dermis"

METHOD_CITATION = """@misc{carrascolimeros2022gan,
  title = {{GAN}-based generative modelling for dermatological applications - comparative study},
  author = {Carrasco Limeros, Sandra and Majchrowska, Sylwia and Zoubi, Mohamad Khir and Ros{\\'e}n, Anna and
            Suvilehto, Juulia and Sj{\\"o}blom, Lisa and Kjellberg, Magnus},
  year = {2022},
  eprint = {2208.11702},
  archiveprefix = {arXiv}
}"""

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def tex(text: str) -> str:
    """Escape a text for TeX, so that a name from a file cannot end a field or begin a command."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return "".join(_SPECIAL.get(character, character) for character in printable)


def entry(key: str, fields: Mapping[str, str]) -> str:
    """Return a BibTeX entry of the type misc, which all styles know.

    Args:
        key: Key of the entry.
        fields: Values of the fields in TeX. Empty ones are left out.
    """
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{body}\n}}"


def bundle_key(name: str) -> str:
    """Return the key of a bundle's entry."""
    return f"dermis-{re.sub(r'[^a-z0-9.-]', '-', name)}"


def bundle_entry(name: str, resolution: int, weights: str, extra: Mapping[str, str] | None = None) -> str:
    """Return a BibTeX entry of a bundle.

    Args:
        name: Name of the bundle.
        resolution: Side of its images, px.
        weights: SHA-256 (hex) of generator.safetensors. A card cannot contain the SHA-256 of its own bundle.
        extra: Further fields in TeX, which replace those of the same name.
    """
    fields = {
        "title": f"{tex(name)}: a generator of synthetic dermoscopy images, {resolution} px",
        "author": "{dermis}",
        "note": f"StyleGAN2-ADA bundle. SHA-256 of generator.safetensors {weights}",
    }
    return entry(bundle_key(name), fields | dict(extra or {}))
