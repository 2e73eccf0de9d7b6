"""/: browsers get the studio, programs the addresses of the API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from services.gateway.dependencies import negotiate
from services.gateway.studio import PREFIX, Studio

router = APIRouter(include_in_schema=False)

_HTML, _JSON = "text/html", "application/json"


@router.get("/")
def index(request: Request) -> Response:
    """Redirect browsers to the studio, or list the addresses of the API. Nothing here is private."""
    studio: Studio = request.app.state.studio
    if studio.enabled and negotiate(request.headers.get("accept"), (_JSON, _HTML)) == _HTML:
        return RedirectResponse(f"{PREFIX}/", headers={"Vary": "Accept"})
    addresses = {"api": "/v1", "documentation": "/docs", "openapi": "/openapi.json", "ready": "/readyz"}
    if studio.enabled:
        addresses["studio"] = f"{PREFIX}/"
    return JSONResponse({"name": "dermis", "links": addresses}, headers={"Vary": "Accept"})
