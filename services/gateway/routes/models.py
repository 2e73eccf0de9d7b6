"""/v1/models: the served bundles."""

from __future__ import annotations

from fastapi import APIRouter

from services.gateway.dependencies import ContextDep
from services.gateway.openapi import problems
from services.gateway.schemas.models import ModelList, ModelWithCard, model_of, model_with_card_of

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List the models", responses=problems())
def list_models(context: ContextDep) -> ModelList:
    """List the served bundles, the default one first."""
    models, uploads = context.models, context.settings.compares_uploads
    return ModelList(data=[model_of(bundle, bundle.name == models.default, uploads) for bundle in models.bundles])


@router.get("/{name}", summary="Show a model with its card", responses=problems("unknown-model", "model-unavailable"))
def get_model(name: str, context: ContextDep) -> ModelWithCard:
    """Show a bundle with its model card."""
    bundle = context.models.serving(name)
    return model_with_card_of(bundle, bundle.name == context.models.default, context.settings.compares_uploads)
