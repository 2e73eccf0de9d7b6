"""The frame of the HTML pages that dermis writes: one file each, with a list of contents, in the look of the studio.

A page loads nothing. Only an interactive page has a script, which sorts tables and enlarges images; it is complete without it.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from dermis.image_metadata import ImageOrigin
from dermis.imaging import Images, encode

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
"""What a page without a script may load: nothing but its own style and images. Services send it as a header too."""


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        id: Its anchor.
        title: Its heading, as text.
        body: Its content, as HTML.
    """

    id: str
    title: str
    body: str


def html_page(
    title: str, sections: Sequence[Section], *, introduction: str = "", warnings: Iterable[str] = (), interactive: bool
) -> str:
    """Make a page. The same arguments give the same page.

    Args:
        title: Title and first heading, as text.
        sections: The sections, in order. Two or more have a list of contents.
        introduction: What follows the warnings, as HTML.
        warnings: What must not be overlooked, as HTML; shown below the heading.
        interactive: Whether tables can be sorted and images enlarged, by a script in the page.
    """
    policy, script = CONTENT_SECURITY_POLICY, ""
    if interactive:
        code = _asset("page.js")
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy, script = f"{policy}; script-src 'sha256-{digest}'", f"<script>{code}</script>"
    has_contents = len(sections) > 1
    shown_warnings = "".join(f'<p class="warning">{warning}</p>\n' for warning in warnings)
    body = "".join(
        f'<section aria-labelledby="{section.id}"><h2 id="{section.id}">{html.escape(section.title)}</h2>\n{section.body}'
        "</section>\n"
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=False)}">
<title>{html.escape(title)}</title><style>{page_colours()}{_asset("page.css")}</style></head>
<body><div class="layout{" with-contents" if has_contents else ""}">{_contents(sections) if has_contents else ""}<main>
<h1>{html.escape(title)}</h1>
{shown_warnings}{introduction}
{body}</main></div>
{script}</body></html>
"""


def page_colours(*, dark: bool = True) -> str:
    """The colours of all pages, as variables of CSS.

    Args:
        dark: Whether the page has a dark scheme too, for people whose browser asks for one.
    """
    whole = _asset("colours.css")
    return whole if dark else whole.partition("@media")[0]


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """A table of names, as text, and what belongs to them, as HTML."""
    rows = "".join(f'<tr><th scope="row">{html.escape(name)}</th><td>{value}</td></tr>' for name, value in facts)
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, classes: str = "") -> str:
    """A table of cells as HTML. The first cell of a row names the row.

    Args:
        name: What it shows, as text, for people who do not see it.
        head: The headings of the columns.
        rows: The rows.
        classes: `sortable` for columns that can be sorted in an interactive page, `numbers` for numbers in all columns but the
            first one, or both.
    """
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
        for first, *others in rows
    )
    attribute = f' class="{classes}"' if classes else ""
    whole = f"<table{attribute}><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    # The keyboard scrolls it where it is wider than the page.
    return f'<div class="scroll" role="group" aria-label="{html.escape(name)}" tabindex="0">{whole}</div>'


def picture(image: Images, alt: str, *, width: int | None = None, origin: ImageOrigin | None = None) -> str:
    """An image uint8 [H, W, 3] inside the page, without loss.

    Args:
        image: The image.
        alt: What it shows, as text.
        width: Its width on the page in pixels; by default its own.
        origin: What its file says of it; None for images that no generator made.
    """
    shown = image.shape[1] if width is None else width
    return png_picture(encode(image, origin=origin), alt, (shown, round(shown * image.shape[0] / image.shape[1])))


def whole_width(side: int, at_most: int) -> int:
    """The width at which an image of this width is shown: a whole multiple, so that all pixels are equally wide.

    Args:
        side: Width of the image in pixels.
        at_most: The largest width, except for images that are wider themselves.
    """
    return side * max(1, at_most // side)


def png_picture(png: bytes, alt: str, size: tuple[int, int]) -> str:
    """A PNG file inside the page.

    Args:
        png: The file.
        alt: What it shows, as text.
        size: Width and height on the page in pixels.
    """
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" width="{size[0]}" height="{size[1]}" src="data:image/png;base64,{data}">'


def _contents(sections: Sequence[Section]) -> str:
    items = "".join(f'<li><a href="#{section.id}">{html.escape(section.title)}</a></li>\n' for section in sections)
    return f'<nav class="contents" aria-label="Contents"><strong>Contents</strong><ul>\n{items}</ul></nav>'


@cache
def _asset(name: str) -> str:
    return files("dermis").joinpath(f"html_{name}").read_text(encoding="utf-8")
