"""What is around every page: head, header with navigation, sign-in, and pages without content of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from dermis_studio._version import __version__
from dermis_studio.access import Needs, Visitor


@dataclass(frozen=True)
class Page:
    """A page of the studio.

    Attributes:
        path: Its path below the prefix; "" for the first page.
        name: Its name in the navigation.
        needs: Scopes without which it can do nothing.
    """

    path: str
    name: str
    needs: Needs


_MODELS = ("models:read",)  # for the names of classes, and what the model can do
PAGES = (
    Page("", "Generate", (("images",), _MODELS)),
    Page("explore", "Explore", (("edits",), _MODELS)),
    Page("project", "Project", (("projections",), _MODELS)),
    Page(
        "authenticity",
        "Authenticity",
        # A generated image is compared and shown, an uploaded one is compared.
        (("authenticity:generated", "authenticity:uploads"), ("images", "authenticity:uploads"), _MODELS),
    ),
    Page("classify", "Classify", (("classify",), _MODELS)),
    Page("datasets", "Datasets", (("datasets:read",),)),
    Page("map", "Map", (("authenticity:generated",), _MODELS)),
    Page("studies", "Reader study", (("studies",),)),
    Page("models", "Models", (_MODELS,)),
)


def first_page(visitor: Visitor) -> Page | None:
    """Return the first page that a visitor may use; None if there is none."""
    return next((page for page in PAGES if not visitor.lacks(page.needs)), None)


# Before the first paint: the chosen theme. Gradio asks the browser for the theme of the system, so the answer is changed.
_THEME_SCRIPT = """
(() => {
  let chosen = null;
  try { chosen = localStorage.getItem("dermis-theme"); } catch { /* storage is off */ }
  const original = window.matchMedia.bind(window);
  if (chosen === "dark" || chosen === "light") {
    window.matchMedia = (query) => {
      const list = original(query);
      if (!/prefers-color-scheme:\\s*dark/.test(query)) return list;
      return { matches: chosen === "dark", media: query, onchange: null, addEventListener() {}, removeEventListener() {},
               addListener() {}, removeListener() {}, dispatchEvent() { return false; } };
    };
  }
  const dark = chosen ? chosen === "dark" : original("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
"""


_SCRIPTS = {  # of single pages, by their paths
    "explore": ("projections.js",),
    "project": ("projections.js", "sending.js"),
    "authenticity": ("sending.js",),
    "classify": ("sending.js",),
    "map": ("embedding_map.js", "projections.js", "sending.js"),
    "studies": ("study_upload.js",),
}


def _head(prefix: str, title: str, page: Page | None = None) -> str:
    more = "".join(
        f'<script defer src="{prefix}/own/{name}?v={__version__}"></script>'
        for name in _SCRIPTS.get("" if page is None else page.path, ())
    )
    return (
        f"<title>{escape(title)}</title>"
        f'<link rel="icon" type="image/svg+xml" href="{prefix}/own/icon.svg">'
        f'<link rel="stylesheet" href="{prefix}/own/studio.css?v={__version__}">'
        f"<script>{_THEME_SCRIPT}</script>"
        f'<script defer src="{prefix}/own/studio.js?v={__version__}"></script>{more}'
    )


def _header(prefix: str, current: Page | None, visitor: Visitor | None) -> str:
    """The header: name, navigation, tenant, sign-out, theme."""
    links = ""
    if visitor is not None:
        for page in PAGES:
            if not visitor.lacks(page.needs):
                here = ' aria-current="page"' if page == current else ""
                links += f'<a href="{prefix}/{page.path}"{here}>{page.name}</a>'
    account = ""
    if visitor is not None and visitor.key is not None:
        account = (
            f'<span class="ds-tenant" title="Tenant of your key">{escape(visitor.tenant[:40])}</span>'
            f'<form method="post" action="{prefix}/sign-out"><button class="ds-quiet" type="submit">Sign out</button></form>'
        )
    return (
        '<a class="ds-skip" href="#ds-main">Skip to the content</a>'
        '<header class="ds-header"><div class="ds-header-inner">'
        f'<a class="ds-brand" href="{prefix}/"><img src="{prefix}/own/icon.svg" alt="" width="26" height="26">'
        "<span>dermis<b>studio</b></span></a>"
        + (f'<nav class="ds-nav" aria-label="Pages">{links}</nav>' if links else '<span class="ds-nav"></span>')
        + f'<div class="ds-account">{account}'
        '<button class="ds-quiet ds-theme" type="button" data-ds-theme aria-label="Dark theme" aria-pressed="false">'
        '<svg width="18" height="18" viewBox="0 0 24 24" aria-hidden="true"><path fill="currentColor" '
        'd="M12 3a9 9 0 1 0 0 18V3Z"/><circle cx="12" cy="12" r="8.25" fill="none" stroke="currentColor" '
        'stroke-width="1.5"/></svg></button></div></div></header>'
    )


_FOOTER = (
    '<footer class="ds-footer">Synthetic dermoscopy for research. <b>Not a medical device:</b> nothing here is a diagnosis.'
    "</footer>"
)


def framed(content: str, prefix: str, page: Page, visitor: Visitor) -> str:
    """Put a page of Gradio into the frame of the studio.

    Args:
        content: The document that Gradio sends.
        prefix: Path of the studio.
        page: The page.
        visitor: Who sees it.

    Raises:
        ValueError: The document does not have the expected parts.
    """
    # Descriptions for other sites and for installing the page as a program, which name foreign addresses.
    content = re.sub(r"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*?/>", "", content)
    content = re.sub(r"<link rel=\"manifest\"[^>]*>", "", content)
    content = content.replace('control_page_title="true"', 'control_page_title="false"', 1)
    before_app, app, after = content.partition("<gradio-app")
    element, end, rest = after.partition("</gradio-app>")
    head, head_end, body = before_app.partition("</head>")
    if not (app and end and head_end):
        raise ValueError("the page of Gradio has another form; install the version that dermis-studio requires")
    return (
        f"{head}{_head(prefix, f'{page.name} - dermis studio', page)}{head_end}{body}{_header(prefix, page, visitor)}"
        f'<div id="ds-main" tabindex="-1"><div class="ds-starting" role="status">Loading the page</div>'
        f"{app}{element}{end}</div>{_FOOTER}{rest}"
    )


def _document(prefix: str, title: str, main: str, current: Page | None = None, visitor: Visitor | None = None) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_head(prefix, f'{title} - dermis studio')}</head><body>{_header(prefix, current, visitor)}"
        f'<main id="ds-main" class="ds-single" tabindex="-1">{main}</main>{_FOOTER}</body></html>'
    )


def sign_in_page(prefix: str, page: str, problem: str) -> str:
    """The page on which a visitor enters a key.

    Args:
        prefix: Path of the studio.
        page: Path of the page to show then.
        problem: Why the last attempt failed; empty at first.
    """
    alert = f'<p class="ds-alert" role="alert" id="problem">{escape(problem)}</p>' if problem else ""
    described = ' aria-describedby="kept problem" aria-invalid="true"' if problem else ' aria-describedby="kept"'
    return _document(
        prefix,
        "Sign in",
        f"""<section class="ds-card ds-signin"><h1>Sign in</h1>
<p>This service needs an API key or an access token. Its operator makes keys with <code>dermis keys create</code>.</p>{alert}
<form method="post" action="{prefix}/session"><input type="hidden" name="page" value="{escape(page)}">
<label for="key">API key or access token</label>
<input id="key" name="key" type="password" required autofocus autocomplete="off" spellcheck="false"{described}>
<button class="ds-primary" type="submit">Sign in</button></form>
<p class="ds-muted" id="kept">Your browser keeps the key until you close it or sign out. The pages cannot read
it, and the studio uses it only for what you do here.</p></section>""",
    )


def forbidden_page(prefix: str, page: Page, visitor: Visitor) -> str:
    """The page that says which scopes a key lacks."""
    groups = [" or ".join(f"<code>{escape(scope)}</code>" for scope in group) for group in visitor.lacks(page.needs)]
    word = "scope" if len(groups) == 1 else "scopes"
    other = ", or choose another page" if first_page(visitor) is not None else ""
    return _document(
        prefix,
        page.name,
        f"""<section class="ds-card"><h1>{page.name} is not available with this key</h1>
<p>It needs the {word} {", and ".join(groups)}, which your key does not have. Ask the operator for a key with {
            "this scope" if len(groups) == 1 else "these scopes"
        }{other}.</p></section>""",
        page,
        visitor,
    )


def error_page(prefix: str, title: str, detail: str, what_to_do: str = "") -> str:
    """A page with an error and what to do."""
    remedy = f'<p class="ds-remedy">{escape(what_to_do)}</p>' if what_to_do else ""
    return _document(
        prefix,
        title,
        f"""<section class="ds-card"><h1>{escape(title)}</h1><p role="alert">{escape(detail)}</p>{remedy}
<p><a class="ds-button" href="">Try again</a> <a href="{prefix}/">First page</a></p></section>""",
    )
