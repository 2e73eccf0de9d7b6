"""Speed of a generator exported as ONNX, beside torch's eager network, in one run on one thread.

    python -m benchmarks.generator_onnx --bundle bundles/demo

The methods take turns, and each number is the median of the rounds, because other work on the machine changes its speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.bundle import load_generator, open_bundle
from dermis.cpus import cpu_identity
from dermis.exports.generator_onnx import check_generator_onnx, generator_onnx
from dermis.latents import noise_vectors, z_for
from dermis.synthesizer.network import noise_resolutions, to_uint8
from dermis.synthesizer.openvino_cpu import import_openvino


def methods(bundle_location: str, batch: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return functions that make one batch each, and the difference of the exported file from torch."""
    import onnxruntime

    bundle = open_bundle(bundle_location)
    generator = load_generator(bundle)
    model = generator_onnx(bundle)
    difference = check_generator_onnx(model, bundle)
    sizes = [size**2 for size in noise_resolutions(generator)]
    z = z_for(0, range(batch), bundle.generator.z_dim)
    label = np.arange(batch, dtype=np.int64) % max(bundle.generator.c_dim, 1)
    noise = noise_vectors([0] * batch, range(batch), sum(sizes))
    inputs: dict[str, np.ndarray] = {"z": z, "truncation_psi": np.ones(batch, np.float32), "noise": noise}
    c = None
    if bundle.generator.c_dim > 0:
        inputs["label"] = label
        c = torch.eye(bundle.generator.c_dim)[torch.from_numpy(label)]
    maps = [
        part.reshape(batch, 1, round(size**0.5), -1)
        for part, size in zip(torch.split(torch.from_numpy(noise), sizes, dim=1), sizes, strict=True)
    ]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    ov = import_openvino()
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model), "CPU", settings)

    def eager() -> Any:
        with torch.inference_mode():
            ws = generator.mapping(torch.from_numpy(z), c)
            return to_uint8(generator.synthesis(ws, dtype=torch.float32, noise=maps)).numpy()

    return {
        "torch, eager": eager,
        "ONNX Runtime": lambda: session.run(["images"], inputs)[0],
        "OpenVINO": lambda: compiled(inputs)["images"],
    }, difference


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--bundle", default="bundles/demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in arguments.batches:
        functions, difference = methods(arguments.bundle, batch)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        for _ in range(arguments.rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        eager = statistics.median(seconds["torch, eager"])
        for name, values in seconds.items():
            median = statistics.median(values)
            rows.append({"batch": batch, "method": name, "images_per_second": batch / median, "ratio": eager / median})
            print(f"batch {batch}  {name:14} {batch / median:8.1f} images/s  {eager / median:5.2f} x torch")
        print(f"batch {batch}  largest difference from torch: {difference:g} of 255")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"processor": cpu_identity(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
