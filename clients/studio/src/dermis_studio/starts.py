"""The pages that can begin with a sample or a projection, which their addresses name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from dermis_studio.access import Needs, Visitor
from dermis_studio.frame import PAGES


@dataclass(frozen=True)
class Start:
    """A page that can begin with an image.

    Attributes:
        path: Its path.
        name: Words of the link.
        sample: Scopes that a visitor needs to begin with a sample, in addition to those of the page.
        projection: The same for a projection; None if the page begins with no projection.
    """

    path: str
    name: str
    sample: Needs = ()
    projection: Needs | None = None

    def needs(self, *, projection: bool) -> Needs | None:
        """The scopes that a visitor needs; None if the page cannot begin with such an image."""
        more = self.projection if projection else self.sample
        return None if more is None else (*_NEEDS[self.path], *more)


_NEEDS = {page.path: page.needs for page in PAGES}
STARTS = (
    Start("explore", "Explore", projection=(("projections",),)),
    Start("authenticity", "Authenticity", (("authenticity:generated",), ("images",))),
    Start("classify", "Classify", (("images",),)),
    Start("map", "Map", projection=(("projections",),)),
    Start("datasets", "Dataset", (("datasets:write",), ("models:read",))),
)


def offered(visitor: Visitor, *, projection: bool = False, other_than: str = "") -> list[tuple[str, str]]:
    """Return path and name of the pages that a visitor may use.

    Args:
        visitor: The visitor.
        projection: Whether the image is a projection, not a sample.
        other_than: Path of the page that has the links.
    """
    offers = [(start, start.needs(projection=projection)) for start in STARTS if start.path != other_than]
    return [(start.path, start.name) for start, needs in offers if needs is not None and not visitor.lacks(needs)]


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
