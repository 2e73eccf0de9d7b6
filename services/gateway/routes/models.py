"""/v1/models: the served bundles."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep
from services.gateway.openapi import problems
from services.gateway.schemas.models import ModelList, ModelWithCard, model_of, model_with_card_of

router = APIRouter(prefix="/v1/models", tags=["models"])

_Reader = Annotated[Principal, requires("models:read")]


@router.get("", summary="List the models", responses=problems())
def list_models(context: ContextDep, principal: _Reader) -> ModelList:
    """List the served bundles that the sender's tenant may use, the default one first."""
    models, uploads = context.models, context.settings.compares_uploads
    default = models.default_for(principal.tenant)
    bundles = models.bundles_for(principal.tenant)
    return ModelList(data=[model_of(bundle, bundle.name == default, uploads) for bundle in bundles])


@router.get("/{name}", summary="Show a model with its card", responses=problems("unknown-model", "model-unavailable"))
def get_model(name: str, context: ContextDep, principal: _Reader) -> ModelWithCard:
    """Show a bundle with its model card."""
    models = context.models
    bundle = models.serving_for(principal.tenant, name)
    is_default = bundle.name == models.default_for(principal.tenant)
    return model_with_card_of(bundle, is_default, context.settings.compares_uploads)
