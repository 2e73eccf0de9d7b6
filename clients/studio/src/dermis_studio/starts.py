"""The pages that can begin with a sample or a projection, which their addresses name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from dermis_studio.access import Visitor


@dataclass(frozen=True)
class Start:
    """A page that can begin with an image.

    Attributes:
        path: Its path.
        name: Words of the link.
        scope: Scope that a visitor needs for it.
        projections: Whether it can also begin with a projection.
    """

    path: str
    name: str
    scope: str
    projections: bool = False


STARTS = (
    Start("explore", "Explore", "edits", projections=True),
    Start("authenticity", "Authenticity", "authenticity:generated"),
    Start("classify", "Classify", "classify"),
    Start("map", "Map", "authenticity:generated", projections=True),
    Start("datasets", "Dataset", "datasets:write"),
)


def offered(visitor: Visitor, *, projection: bool = False, other_than: str = "") -> list[tuple[str, str]]:
    """Return path and name of the pages that a visitor may use.

    Args:
        visitor: The visitor.
        projection: Whether the image is a projection, not a sample.
        other_than: Path of the page that has the links.
    """
    return [
        (start.path, start.name)
        for start in STARTS
        if start.path != other_than and (start.projections or not projection) and visitor.may(start.scope)
    ]


def links(query: str, pages: Iterable[tuple[str, str]], main: str = "") -> str:
    """Return links to pages as HTML.

    Args:
        query: The query that names the image.
        pages: Path and name of each page.
        main: Path of the page whose link stands out.
    """
    return "".join(
        f'<a class="ds-button{" ds-strong" * (path == main)}" href="{path}?{escape(query)}">{escape(name)}</a>'
        for path, name in pages
    )
