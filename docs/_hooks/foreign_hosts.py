"""Site hook: refuses a site whose pages load scripts, styles, fonts or images from another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

_FOREIGN = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_CSS_URL = re.compile(r"""(?:url\(|@import)\s*["']?((?:[a-z][a-z0-9+.-]*:)?//[^"')\s]+)""", re.IGNORECASE)
_LOADED = {"src", "srcset", "data", "poster"}
_LOADED_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "modulepreload", "icon", "manifest", "dns-prefetch"}


class _References(HTMLParser):
    """Collects the addresses of other hosts that a browser loads with the page."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        loaded = {attributes[name] for name in _LOADED & attributes.keys()}
        if tag == "link" and _LOADED_LINKS & set(attributes.get("rel", "").lower().split()):
            loaded.add(attributes.get("href", ""))
        self.foreign += [address for address in loaded if _FOREIGN.match(address)]
        self.foreign += _CSS_URL.findall(attributes.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.foreign += _CSS_URL.findall(data)


def foreign_references(page: Path) -> list[str]:
    """Addresses of other hosts from which an HTML page or a style sheet loads something."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".css":
        return _CSS_URL.findall(text)
    parser = _References()
    parser.feed(text)
    return parser.foreign


def on_post_build(config: MkDocsConfig) -> None:
    """Check every page and style sheet of the site."""
    from mkdocs.exceptions import PluginError

    for page in sorted(Path(config.site_dir).rglob("*")):
        if page.suffix in (".html", ".css") and (foreign := foreign_references(page)):
            raise PluginError(f"{page} loads from another host: {', '.join(foreign)}")
