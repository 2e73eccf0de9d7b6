"""What exports of networks to ONNX share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any


def remove_notes(model: Any, name: str) -> None:
    """Remove the exporter's notes, which contain paths and code of this machine.

    Args:
        model: The ONNX model, which is changed.
        name: New name of its graph.
    """
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    graph.name = name
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's progress messages and its warnings about itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
