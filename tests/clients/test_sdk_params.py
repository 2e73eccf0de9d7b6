"""The choices and options that the SDK declares are those of the API."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from dermis_client import ClassifierParams, EditParams, PrivacyParams, ProvenanceParams, SweepParams, models, params
from pydantic import BaseModel

from dermis import network_config
from dermis.dataset import request
from dermis.projection import schedule
from services.gateway.schemas.edits import Sweep
from services.webhooks.outbox import EventName


@pytest.mark.parametrize(
    ("declared", "api"),
    [
        (ClassifierParams, request.ClassifierOptions),
        (PrivacyParams, request.PrivacyOptions),
        (ProvenanceParams, request.ProvenanceOptions),
        (EditParams, request.EditOption),
        (SweepParams, Sweep),
    ],
)
def test_objects_of_requests_have_the_fields_and_choices_of_the_api(declared: Any, api: type[BaseModel]) -> None:
    hints = get_type_hints(declared)
    assert hints.keys() == api.model_fields.keys()
    assert declared.__required_keys__ == {name for name, field in api.model_fields.items() if field.is_required()}
    choices = {
        name: set(get_args(field.annotation))
        for name, field in api.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    assert choices == {name: set(get_args(hint)) for name, hint in hints.items() if get_origin(hint) is Literal}


@pytest.mark.parametrize(
    ("declared", "api"),
    [
        (models.DatasetFormat, request.DatasetFormat),
        (models.ImageFormat, request.ImageFormat),
        (models.NoiseMode, network_config.NoiseMode),
        (params.WebhookEvent, EventName),
        (params.ProjectionSpace, schedule.Space),
        (params.ProjectionStart, schedule.Start),
    ],
)
def test_choices_are_those_of_the_api(declared: Any, api: Any) -> None:
    assert set(get_args(declared)) == set(get_args(api)) != set()


def test_schedules_are_those_of_the_service() -> None:
    assert set(get_args(params.ProjectionSchedule)) == set(schedule.SCHEDULES)
