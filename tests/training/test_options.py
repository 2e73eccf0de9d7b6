"""Tests of options by name: values are checked against the fields of a configuration, and messages name the option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dermis.errors import TrainingError
from training.federated.config import parse_options, parse_run_config
from training.federated.site import parse_node_config
from training.options import check_options, parse_assignments


@dataclass(frozen=True)
class Configuration:
    count: int
    rate: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    text: str = ""
    flag: bool = False
    folder: Path | None = None
    a_list: list[Any] | None = None


def test_option_values_have_types_of_their_fields() -> None:
    values = check_options(
        {"count": 3, "rate": 2, "mode": "slow", "text": "x", "folder": "/data", "a_list": [1]}, Configuration
    )
    assert values == {
        "count": 3, "rate": 2.0, "mode": "slow", "text": "x", "folder": Path("/data"), "a_list": [1],
    }  # fmt: skip
    assert type(values["rate"]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 3.0}, "--x count: must be a whole number, not 3.0"),
        ({"count": True}, "--x count: must be a whole number, not True"),
        ({"count": "3"}, "--x count: must be a whole number, not '3'"),
        ({"rate": "3"}, "--x rate: must be a number, not '3'"),
        ({"rate": float("inf")}, "--x rate: must be a number, not inf"),
        ({"mode": "medium"}, "--x mode: 'medium' is none of fast, slow"),
        ({"text": 3}, "--x text: must be text, not 3"),
        ({"flag": 1}, "--x flag: must be true or false, not 1"),
        ({"folder": 3}, "--x folder: must be a path, not 3"),
        ({"a_list": "x"}, "--x a_list: must be a list, not 'x'"),
        ({"size": 3}, "--x size: unknown option; known are count, rate, mode, text, flag, folder, a_list"),
    ],
)
def test_wrong_option_value_is_refused_with_expected_type(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        check_options(values, Configuration, "--x ")
    assert str(caught.value) == message


def test_dashed_names_are_read_and_excluded_options_are_refused() -> None:
    assert check_options({"a-list": []}, Configuration, dashes=True) == {"a_list": []}
    for values, options in (({"a_list": []}, {"dashes": True}), ({"count": 1}, {"exclude": ("count",)})):
        with pytest.raises(TrainingError, match="unknown option"):
            check_options(values, Configuration, **options)  # type: ignore[arg-type]


def test_texts_need_no_quotation_marks() -> None:
    assert parse_assignments(["a=1", "b = x y", 'c="3"', "a=2"], "--set ") == {"a": 2, "b": "x y", "c": "3"}
    with pytest.raises(TrainingError, match="--set a: must be option=value"):
        parse_assignments(["a"], "--set ")


def test_wrong_values_of_federation_or_site_are_refused_by_name() -> None:
    site = {"data": "/d", "state": "/s"}
    for parse, values, message in (
        (parse_run_config, {"round-timeout": "long"}, "round-timeout: must be a number, not 'long'"),
        (parse_run_config, {"wire-dtype": "fp8"}, "wire-dtype: 'fp8' is none of fp32, fp16, bf16"),
        (parse_node_config, site | {"threads": 1.5}, "node-config: threads: must be a whole number, not 1.5"),
        (parse_node_config, site | {"require-secure-aggregation": "no"}, "must be true or false, not 'no'"),
        (parse_options, ["binary=1"], "--federation binary: must be true or false, not 1"),
    ):
        with pytest.raises(TrainingError, match=message):
            parse(values)  # type: ignore[operator]
    assert parse_node_config(site | {"validation": 0, "metadata": "", "partition-id": 3}).validation == 0.0
