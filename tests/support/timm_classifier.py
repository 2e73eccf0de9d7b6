"""A classifier with a small network of timm."""

from __future__ import annotations

from pathlib import Path

from dermis.bundle.classifier import ClassifierDescription, InputSpec, write_classifier
from training.classifier.config import ClassifierConfig
from training.classifier.export import to_onnx
from training.classifier.network import finished_network, new_network

SIZE = 48


def make_timm_classifier(out: Path) -> Path:
    """Write a small network of timm with random weights in the form of a trained one."""
    config = ClassifierConfig(architecture="test_efficientnet", size=SIZE)
    network = finished_network(new_network(config, "none"), 0.0)
    description = ClassifierDescription(
        "test_efficientnet",
        InputSpec(SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("benign", "malignant"),
        "malignant",
        1.5,
        {"default": 0.5},
        "fp16",
        network.head.in_features,
    )
    write_classifier(out, description, to_onnx(network, SIZE), "# Test\n")
    return out
