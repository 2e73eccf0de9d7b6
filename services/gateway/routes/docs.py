"""The OpenAPI document, and Swagger UI to read and try the API."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.problems import ProblemError

router = APIRouter(include_in_schema=False)

_Reader = Annotated[Principal, requires(opened_by="open_docs")]

_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def _asset_folder() -> Path | None:
    """The folder of the copy of Swagger UI in BentoML, with which the page needs no internet; None if there is none."""
    spec = importlib.util.find_spec("bentoml")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "_internal" / "server" / "static_content"
    return folder if all((folder / name).is_file() for name in _ASSETS) else None


@router.get("/openapi.json")
def openapi(request: Request, principal: _Reader) -> Response:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
def docs(request: Request, principal: _Reader) -> HTMLResponse:
    """Swagger UI for the OpenAPI document."""
    urls: dict[str, Any] = {}
    if _asset_folder() is not None:
        urls = {"swagger_js_url": "/docs/swagger-ui-bundle.js", "swagger_css_url": "/docs/swagger-ui.css"}
    return get_swagger_ui_html(
        openapi_url="/openapi.json", title=f"{request.app.title} API", swagger_favicon_url="data:,", **urls
    )


@router.get("/docs/{name}")
def asset(name: str, principal: _Reader) -> Response:
    """A file of Swagger UI."""
    folder = _asset_folder()
    if folder is None or name not in _ASSETS:
        raise ProblemError("not-found", "no such path; /docs lists those that exist")
    return FileResponse(folder / name, media_type=_ASSETS[name], headers={"Cache-Control": "max-age=86400"})
