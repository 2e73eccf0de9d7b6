"""Features of a classifier in bfloat16 on processors that multiply it natively, in half the time. Imports no torch.

They differ from those of ONNX Runtime, which are float32. So `dermis.authenticity.checker` only uses them for images that are
clearly not near a training image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.classifier import MODEL, read_model
from dermis.classifier.onnx_session import Classifier, find_classifier
from dermis.cpus import available_cpus
from dermis.openvino_images import EachImage, convert_and_compile, fastest_precision, have_openvino

_GROUP = 4  # images that one core computes together

FastFeatures = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [N, S, S, 3] at the classifier's size -> features float32 [N, dim]. N is at least 1."""


def fast_features(source: Any, classifier: Classifier, threads: int | None) -> FastFeatures | None:
    """Compile the network of a classifier in bfloat16.

    Args:
        source: The bundle or folder of the classifier.
        classifier: The loaded classifier, which has checked the network.
        threads: Images that are computed at the same time; None for the number of cores that this process can use.

    Returns:
        The function; None if it would not be faster, or OpenVINO cannot compile the network.
    """
    if classifier.device != "cpu" or fastest_precision() != "bf16" or not have_openvino():
        return None
    _, location = find_classifier(source)
    model = read_model(location, classifier.description)
    size = classifier.description.input.size

    def convert() -> Any:
        from dermis.synthesizer.openvino_cpu import import_openvino

        network = import_openvino().Core().read_model(model)
        network.reshape({"images": [_GROUP, size, size, 3]})
        return network

    compiled: EachImage | None = convert_and_compile(
        convert, f"{location}/{MODEL}", precision="bf16", threads=threads or available_cpus(), output="features"
    )
    return compiled
