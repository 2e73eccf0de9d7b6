"""Speed of classification: `python -m benchmarks.classification [--json] [--classifier DIR] [--architecture NAME]`.

The serving path (ONNX Runtime, one image per core) is compared in one run with the same weights in an eager float32 torch
network at its best batch size, and with the default use of ONNX Runtime (all cores on one batch). Rounds of all of them
alternate and the best of each counts, so that short activity of other programs does not distort the ratios. Without
--classifier a network with random weights is exported first: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.bundle.classifier import MODEL, ClassifierDescription, InputSpec, read_model, write_classifier
from dermis.classifier.onnx_session import Classifier, find_classifier
from dermis.classifier.preprocess import to_input
from dermis.classifier.scores import sigmoid
from dermis.classifier.torch_network import TorchClassifier, load_torch_classifier
from dermis.cpus import available_cpus
from dermis.imaging import Images

BATCHES = (1, 8, 32)
PHOTOGRAPH = (450, 600)  # height and width of most images in HAM10000
REQUIRED_AGREEMENT = 1e-4


def random_classifier(out: Path, architecture: str, size: int) -> ClassifierDescription:
    """Write a classifier's folder in the form of training, with random weights."""
    from training.classifier.config import ClassifierConfig
    from training.classifier.export import to_onnx
    from training.classifier.network import finished_network, new_network

    network = finished_network(new_network(ClassifierConfig(architecture, size), weights="none"), 0.0)
    description = ClassifierDescription(
        architecture=architecture,
        input=InputSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        class_names=("benign", "malignant"),
        positive_class="malignant",
        temperature=1.0,
        thresholds={"default": 0.5},
        weights_dtype="fp16",
        feature_dim=network.head.in_features,
        provenance={"data": "none: random weights"},
    )
    return write_classifier(out, description, to_onnx(network, size), "# Random weights\n\nFor measuring speed only.\n")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_rates(jobs: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Images/s of each job (number of images, function): the best of alternating rounds, after one to warm up."""
    rates = dict.fromkeys(jobs, 0.0)
    for turn in range(rounds + 1):
        for name, (count, run) in jobs.items():
            rate = count / seconds(run)
            rates[name] = max(rates[name], rate) if turn else 0.0
    return rates


def measure(folder: str, images: int, rounds: int) -> dict[str, Any]:
    """Measure one classifier on the CPU."""
    description, location = find_classifier(folder)
    size, cores = description.input.size, available_cpus()
    rng = np.random.default_rng(0)
    inputs: Images = rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    photograph: Images = rng.integers(0, 256, (*PHOTOGRAPH, 3), dtype=np.uint8)
    torch.set_num_threads(cores)
    eager = load_torch_classifier(location)
    plain = _plain_session(read_model(location, description), cores)
    with Classifier(location, device="cpu") as classifier:
        jobs: dict[str, tuple[int, Callable[[], object]]] = {
            "serving": (images, lambda: classifier.logits(inputs)),
            "serving_one": (1, lambda: classifier.logits(inputs[:1])),
            "resizing": (1, lambda: to_input(photograph, size)),
        }
        for batch in BATCHES:
            starts = range(0, images - batch + 1, batch)
            count = len(starts) * batch
            jobs[f"eager_{batch}"] = (count, _over(starts, batch, lambda x: _eager(eager, x), inputs))
            jobs[f"plain_{batch}"] = (
                count,
                _over(starts, batch, lambda x: plain.run(["logit"], {"images": x}), inputs),
            )
        rates = best_rates(jobs, rounds)
        difference = np.abs(
            sigmoid(classifier.logits(inputs).astype(np.float64)) - sigmoid(_eager(eager, inputs).astype(np.float64))
        )
        identity = dict(classifier.identity)
    best_eager = max(rates[f"eager_{batch}"] for batch in BATCHES)
    return {
        "ratio_to_eager_fp32": rates["serving"] / best_eager,
        "ratio_to_onnxruntime_in_batches": rates["serving"] / max(rates[f"plain_{batch}"] for batch in BATCHES),
        "ratio_of_one_image": rates["serving_one"] / rates["eager_1"],
        "largest_difference_of_probabilities": float(difference.max()),
        "agrees": bool(difference.max() <= REQUIRED_AGREEMENT),
        "images_per_second": rates["serving"],
        "one_image_seconds": 1 / rates["serving_one"],
        "eager_fp32_images_per_second": {str(batch): rates[f"eager_{batch}"] for batch in BATCHES},
        "onnxruntime_images_per_second": {str(batch): rates[f"plain_{batch}"] for batch in BATCHES},
        "resizing_seconds": 1 / rates["resizing"],
        "architecture": description.architecture,
        "size": size,
        "model_megabytes": description.files[MODEL].bytes / 1e6,
        "images": images,
        "cpus": cores,
        "versions": {"onnxruntime": identity["onnxruntime"], "torch": torch.__version__},
    }


def _eager(network: TorchClassifier, inputs: Images) -> Any:
    """Logits float32 [N] of images uint8 [N, S, S, 3]."""
    with torch.inference_mode():
        return network(torch.from_numpy(inputs).permute(0, 3, 1, 2).float())[0].numpy()


def _over(starts: range, batch: int, run: Callable[[Images], object], inputs: Images) -> Callable[[], object]:
    return lambda: [run(inputs[start : start + batch]) for start in starts]


def _plain_session(model: bytes, cores: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = cores
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def show(result: dict[str, Any]) -> None:
    def rates(by_batch: dict[str, float]) -> str:
        return ", ".join(f"{rate:.1f} (batch {batch})" for batch, rate in by_batch.items())

    rows = {
        "classifier": f"{result['architecture']}, {result['size']} px, {result['model_megabytes']:.1f} MB",
        "serving, images/s": f"{result['images_per_second']:.1f} on {result['cpus']} CPUs",
        "eager float32, images/s": rates(result["eager_fp32_images_per_second"]),
        "ONNX Runtime, images/s": rates(result["onnxruntime_images_per_second"]),
        "times eager": f"{result['ratio_to_eager_fp32']:.2f} (one image: {result['ratio_of_one_image']:.2f})",
        "times ONNX Runtime": f"{result['ratio_to_onnxruntime_in_batches']:.2f}",
        "one image, ms": f"{1000 * result['one_image_seconds']:.1f}, resizing {1000 * result['resizing_seconds']:.1f}",
        "largest difference": f"{result['largest_difference_of_probabilities']:.1e} (allowed {REQUIRED_AGREEMENT:.0e})",
    }
    print("\n".join(f"{name:<26}  {value}" for name, value in rows.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--classifier", help="a classifier's folder, or a bundle with one")
    parser.add_argument("--architecture", default="efficientnet_b2", help="of the network with random weights")
    parser.add_argument("--size", type=int, default=256, help="px, of the network with random weights")
    parser.add_argument("--images", type=int, default=64, help="images in a round")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    if options.images < max(BATCHES):
        parser.error(f"--images: at least {max(BATCHES)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.classifier is None:
            random_classifier(Path(folder) / "classifier", options.architecture, options.size)
        result = measure(options.classifier or f"{folder}/classifier", options.images, options.rounds)
    print(json.dumps(result)) if options.json else show(result)


if __name__ == "__main__":
    main()
