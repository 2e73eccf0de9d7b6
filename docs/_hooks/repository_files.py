"""Site hook: pages and links that lie outside of docs/, and info strings of code fences.

The README is the home page. A relative link to another file of the repository leads to its page if it has one, or to a
copy of the file below `repository/`. So the same links work in the repository and on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "examples/README.md": "examples.md",
    "bundles/demo/MODEL_CARD.md": "demo/MODEL_CARD.md",
    "bundles/demo/classifier/CLASSIFIER_CARD.md": "demo/classifier/CLASSIFIER_CARD.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
_FENCE = re.compile(r"^\s*(```+|~~~+)(.*)$")
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links to their pages or copies, and remove what tests read from info strings (`no-run`, `no-check`)."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    lines = []
    fence = ""
    for line in markdown.splitlines():
        match = _FENCE.match(line)
        if match and not fence:
            fence = match[1]
            lines.append(re.sub(r" no-(run|check)\b", "", line))
        elif match and match[1] == fence and not match[2].strip():
            fence = ""
            lines.append(line)
        elif fence:
            lines.append(line)
        else:
            lines.append(_LINK.sub(lambda link: _led(link, source, page, config, files), line))
    return "\n".join(lines)


def _led(link: re.Match[str], source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    target = link[2]
    if _SCHEME.match(target) or target.startswith("/"):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith("docs/"):
        uri = path.removeprefix("docs/")
    elif path in PAGES:
        uri = PAGES[path]
    elif (ROOT / path).exists() and not path.startswith(".."):
        uri = _copied(path, config, files)
    else:
        return link[0]  # MkDocs reports it
    return f"{link[1]}{posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{link[3]}"


def _copied(path: str, config: MkDocsConfig, files: Files) -> str:
    """The address of a copy of a file, or of a text that lists a folder's files."""
    uri = f"repository/{path}" if Path(path).suffix else f"repository/{path}.txt"
    if files.get_file_from_path(uri) is None:
        if (ROOT / path).is_dir():
            listing = "".join(f"{path}/{item.name}\n" for item in sorted((ROOT / path).iterdir()) if item.is_file())
            files.append(File.generated(config, uri, content=listing))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return uri
