"""ClassificationsResult as flows: many images in calls that the service takes, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dermis_client._flow import Api, D, Flow, Request, call, parse
from dermis_client._requests import most_bytes
from dermis_client._uploads import MOST_FILES, File, Source, in_calls, parts_of
from dermis_client.errors import APIResponseError, DermisError
from dermis_client.models import ClassificationsResult

# Heat maps take seconds an image: each image goes by itself, so that no call runs into a time limit.
MOST_HEAT_MAPS = 1


def classify(
    api: Api[D],
    sources: Sequence[Source],
    params: dict[str, str],
    report: Callable[[int, int], None],
) -> Flow[ClassificationsResult]:
    """POST /v1/classifications, as often as it takes. `report` gets (done, total) after each call."""
    most = MOST_HEAT_MAPS if "heat_map" in params else MOST_FILES
    return _merged((yield from in_calls(sources, most, partial(_send, api, params), report)))


def _send(api: Api[D], params: dict[str, str], files: Sequence[File]) -> Flow[ClassificationsResult]:
    most = most_bytes(len(files) if "heat_map" in params else 0)
    request = Request("POST", "/v1/classifications", params=params, files=parts_of(files), most=most)
    result = parse((yield from call(request, api.max_retries)), ClassificationsResult.model_validate)
    if len(result) != len(files):
        raise APIResponseError(f"the service gave {len(result)} answers for {len(files)} images; is base_url right?")
    for item in result.data:
        if item.heat_map is not None:
            item.heat_map.check()
        elif "heat_map" in params:
            raise APIResponseError("the service made no heat map; it is older than this client")
    told = [
        item.model_copy(update={"index": file.place, "name": file.name})
        for item, file in zip(result.data, files, strict=True)
    ]
    return result.model_copy(update={"data": told})


def _merged(results: Sequence[ClassificationsResult]) -> ClassificationsResult:
    first = results[0]
    if any((one.model, one.threshold) != (first.model, first.threshold) for one in results):
        raise DermisError("the service changed its classifier while the images were sent; send them again")
    return first.model_copy(update={"data": [item for one in results for item in one.data]})
