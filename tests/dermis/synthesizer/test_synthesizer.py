"""Tests that the serving path gives the images of the networks for every batch, backend and number of threads."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dermis import cpus
from dermis.bundle import Bundle
from dermis.devices import fast_dtype
from dermis.errors import DermisError, RequestError
from dermis.latents import z_for
from dermis.networks import Generator, GeneratorConfig, NoiseMode, one_hot
from dermis.synthesizer import Synthesizer, choice, cuda
from dermis.synthesizer.model_cache import read_stages
from dermis.synthesizer.network import ImageStage
from dermis.synthesizer.openvino_cpu import import_openvino
from optional_packages import needs_openvino
from plain_synthesis import CONFIGS, make_bundle, make_generator, reference

Image = npt.NDArray[np.uint8]
BACKENDS = [pytest.param("openvino", marks=needs_openvino), "torch"]


@cache
def make(name: str, backend: str = "torch", dtype: str = "float32", threads: int | None = None) -> Synthesizer:
    generator = make_generator(name)
    return Synthesizer(
        make_bundle(generator), device="cpu", backend=backend, dtype=dtype, threads=threads, generator=generator
    )


def difference(a: Image, b: Image) -> npt.NDArray[np.int64]:
    differences: npt.NDArray[np.int64] = np.abs(a.astype(np.int64) - b.astype(np.int64))
    return differences


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_synthesizer_images_equal_those_of_network(name: str, backend: str) -> None:
    labels = [0, max(CONFIGS[name].c_dim - 1, 0)]
    expected = np.stack([reference(name, i, label) for i, label in enumerate(labels)])
    assert expected.std() > 10  # neither grey nor saturated
    exact = make(name, backend).images([7, 7], [0, 1], labels)
    assert exact.shape == expected.shape and exact.dtype == np.uint8
    assert difference(exact, expected).max() <= 1
    if backend == "torch" or torch.bfloat16 == fast_dtype(torch.device("cpu")):
        fast = make(name, backend, "bfloat16")
        assert fast.identity["dtype"] == "bfloat16"
        assert 0 < difference(fast.images([7, 7], [0, 1], labels), expected).mean() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_each_noise_mode_equal_those_of_network(backend: str) -> None:
    synthesizer = make("conditional", backend)
    drawn = {}
    for mode in ("const", "random", "none"):
        drawn[mode] = synthesizer.images([7], [5], [2], noise_mode=mode)[0]
        assert difference(drawn[mode], reference("conditional", 5, 2, mode)).max() <= 1
    assert difference(drawn["const"], drawn["random"]).mean() > 2
    assert difference(drawn["const"], drawn["none"]).mean() > 2


@pytest.mark.parametrize("cutoff", [None, 0, 3])
def test_truncation_and_cutoff_equal_those_of_network(cutoff: int | None) -> None:
    image = make("conditional").images([7], [1], [1], truncation_psi=0.4, truncation_cutoff=cutoff)[0]
    expected = reference("conditional", 1, 1, truncation_psi=0.4, truncation_cutoff=cutoff)
    assert difference(image, expected).max() <= 1
    changed = difference(image, reference("conditional", 1, 1)).mean() > 1
    assert changed == (cutoff != 0)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_depend_on_its_batch_or_on_threads(backend: str) -> None:
    dtype = "bfloat16" if backend == "torch" else "auto"
    synthesizer = make("conditional", backend, dtype)
    labels = [0, 1, 2, 0, 1]
    together = synthesizer.images([7] * 5, range(5), labels, noise_mode="random", truncation_psi=0.7)
    with ThreadPoolExecutor(2) as callers:  # one by one, in another order, from two threads at a time
        alone = callers.map(
            lambda i: synthesizer.images([7], [i], [labels[i]], noise_mode="random", truncation_psi=0.7)[0],
            (4, 2, 0, 1, 3),
        )
        assert all((image == together[i]).all() for i, image in zip((4, 2, 0, 1, 3), alone, strict=True))
    assert difference(together[0], together[3]).mean() > 1  # same label, another index
    for threads in (1, 3):
        other = make("conditional", backend, dtype, threads)
        assert other.preferred_batch == threads
        assert (other.images([7] * 5, range(5), labels, noise_mode="random", truncation_psi=0.7) == together).all()


def test_images_from_ws_equal_images_of_samples() -> None:
    synthesizer = make("conditional")
    generator = make_generator("conditional")
    z = torch.from_numpy(z_for(7, [0, 1], generator.config.z_dim))
    with torch.inference_mode():
        ws = generator.mapping(z, one_hot([1, 1], 3)).numpy()
    expected = synthesizer.images([7, 7], [0, 1], [1, 1], noise_mode="random")
    assert difference(synthesizer.images_from_ws(ws, "random", seeds=[7, 7], indices=[0, 1]), expected).max() <= 1
    with pytest.raises(RequestError, match="noise_mode"):
        synthesizer.images_from_ws(ws, "random")
    with pytest.raises(RequestError, match=r"\[N, 8, 24\]"):
        synthesizer.images_from_ws(ws[:, :3])


def test_invalid_synthesizer_arguments_are_refused() -> None:
    synthesizer = make("conditional")
    assert synthesizer.images([], [], []).shape == (0, 32, 32, 3)
    with pytest.raises(RequestError, match="outside 0 to 2"):
        synthesizer.images([7], [0], [3])
    with pytest.raises(RequestError, match="2 seeds, 1 indices"):
        synthesizer.images([7, 7], [0], [1])
    with pytest.raises(RequestError, match="noise_mode"):
        synthesizer.images([7], [0], [1], noise_mode="loud")  # type: ignore[arg-type]
    for options in ({"backend": "fast"}, {"dtype": "int4"}, {"threads": 0}, {"device": "abacus"}):
        with pytest.raises(DermisError, match=next(iter(options))):
            Synthesizer(
                make_bundle(make_generator("unconditional")), generator=make_generator("unconditional"), **options
            )
    transparent = Generator(GeneratorConfig(8, z_dim=8, w_dim=8, img_channels=4, channel_base=64, channel_max=8))
    with pytest.raises(DermisError, match="4 channels"):
        Synthesizer(make_bundle(transparent), generator=transparent)


def test_synthesizer_uses_torch_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    generator = make_generator("unconditional")
    with Synthesizer(make_bundle(generator), device="cpu", generator=generator) as synthesizer:
        assert synthesizer.identity["backend"] == "torch"
        assert difference(synthesizer.images([7], [0], [0])[0], reference("unconditional", 0, 0)).mean() < 2
    with pytest.raises(RuntimeError, match="shutdown"):
        synthesizer.images([7], [0], [0])
    with pytest.raises(DermisError, match="openvino does not work on this machine"):
        Synthesizer(make_bundle(generator), device="cpu", backend="openvino", generator=generator)


@needs_openvino
def test_first_use_of_openvino_by_many_threads_does_not_deadlock() -> None:
    """Without the precaution in `import_openvino` one process in two hangs; three make an accidental pass unlikely."""
    code = """
import sys, threading
from dermis.synthesizer.openvino_cpu import import_openvino
openvino = import_openvino()
together = threading.Barrier(24)
def first_use():
    together.wait()
    openvino.Type.f32.to_dtype()
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=first_use) for _ in range(24)]
for thread in threads: thread.start()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()


@needs_openvino
def test_synthesizer_uses_torch_if_openvino_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = import_openvino()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported processor")

    monkeypatch.setattr(openvino, "convert_model", fail)
    generator = make_generator("unconditional")
    with Synthesizer(make_bundle(generator), device="cpu", generator=generator) as synthesizer:
        assert synthesizer.identity["backend"] == "torch"


def test_synthesizer_uses_float32_without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_processor", lambda: ("a processor", frozenset({"avx2"})))
    generator = make_generator("unconditional")
    synthesizer = Synthesizer(make_bundle(generator), device="cpu", generator=generator)
    assert synthesizer.identity["dtype"] == "float32"
    assert synthesizer.identity["instructions"] == "avx2"


@needs_openvino
def test_openvino_sends_no_usage_reports() -> None:
    make("unconditional", "openvino")
    assert "openvino.tools.ovc.convert_impl" in sys.modules
    assert not [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module]


def test_streams_of_cuda_backend_do_not_mix_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with recordings replaced by plain calls: buffers, threads and constant noise; the rest needs a GPU."""

    class NoStream:
        def wait_stream(self, other: object) -> None: ...

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    monkeypatch.setattr(torch, "compile", lambda stage, dynamic: stage)
    monkeypatch.setattr(cuda._StreamSlot, "_record", cuda._StreamSlot._plain)
    generator = make_generator("conditional")
    backend = cuda.cuda_backend(generator, torch.device("cpu"), torch.float32, threads=4)
    assert backend.workers == 4 > cuda.STREAMS
    monkeypatch.setattr(choice, "_build", lambda *_: backend)
    with Synthesizer(make_bundle(generator), device="cpu", generator=generator) as synthesizer:
        count = 2 * backend.micro_batch + 3
        labels = [i % 3 for i in range(count)]
        drawn: dict[NoiseMode, Image] = {}
        for noise in ("const", "random", "const"):
            drawn[noise] = synthesizer.images([7] * count, range(count), labels, noise_mode=noise)
        for noise, images in drawn.items():
            for i in (0, 5, backend.micro_batch + 1, count - 1):
                assert difference(images[i], reference("conditional", i, labels[i], noise)).max() <= 1, (noise, i)


def test_bundles_of_one_shape_share_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a function eight times at most; a server or a long training run draws with more bundles than that."""
    from torch._dynamo import utils

    stages: list[ImageStage] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    monkeypatch.setattr(torch, "compile", lambda stage, dynamic: stages.append(stage))
    monkeypatch.setattr(cuda, "_recorded_slots", lambda *_: [None])
    for seed in range(3):
        generator = copy.deepcopy(make_generator("unconditional"))
        for block in generator.synthesis.blocks:
            for layer in block.layers:
                layer.noise_strength.fill_(0.1 + seed)
        cuda.cuda_backend(generator, torch.device("cpu"), torch.float32, threads=1)
    monkeypatch.undo()
    torch._dynamo.reset()
    utils.counters.clear()
    for stage in stages:
        scales, noise = torch.ones(2, sum(stage.scale_sizes)), torch.zeros(2, sum(stage.noise_sizes))
        with torch.inference_mode():
            compiled = torch.compile(stage, dynamic=False, backend="eager")(scales, noise)
            assert torch.equal(compiled, stage(scales, noise))
    assert utils.counters["stats"]["unique_graphs"] == 1


@needs_openvino
def test_cached_networks_draw_same_images_without_torch(tmp_path: Path, tiny_bundle: Bundle) -> None:
    options = {"seeds": [3] * 4, "indices": range(4), "labels": [0, 1, 0, 1]}
    with Synthesizer(tiny_bundle, device="cpu", cache=tmp_path / "cache") as synthesizer:
        expected = synthesizer.images(**options, noise_mode="random", truncation_psi=0.7)
        identity = dict(synthesizer.identity)
    code = (
        "import sys, json; from pathlib import Path; from dermis.bundle import open_bundle\n"
        "from dermis.synthesizer import Synthesizer\n"
        "synthesizer = Synthesizer(open_bundle(sys.argv[1]), device='cpu', cache=Path(sys.argv[2]))\n"
        "images = synthesizer.images([3] * 4, range(4), [0, 1, 0, 1], noise_mode='random', truncation_psi=0.7)\n"
        "print(json.dumps(['torch' in sys.modules, dict(synthesizer.identity), images.tolist()]))\n"
    )
    command = [sys.executable, "-c", code, tiny_bundle.location, str(tmp_path / "cache")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3]).stdout
    has_torch, its_identity, images = json.loads(output.splitlines()[-1])
    assert not has_torch and its_identity == identity
    assert np.array_equal(np.array(images, np.uint8), expected)


@needs_openvino
def test_unsafe_or_damaged_cached_networks_are_not_read(tmp_path: Path, tiny_bundle: Bundle) -> None:
    cache = tmp_path / "cache"
    with Synthesizer(tiny_bundle, device="cpu", cache=cache):
        pass
    (entry,) = cache.iterdir()
    assert read_stages(cache, tiny_bundle.digest) is not None
    assert read_stages(cache, "f" * 64) is None
    entry.chmod(0o770)
    assert read_stages(cache, tiny_bundle.digest) is None
    entry.chmod(0o700)
    weights = bytearray((entry / "images.bin").read_bytes())
    weights[-1] ^= 1
    (entry / "images.bin").write_bytes(weights)
    assert read_stages(cache, tiny_bundle.digest) is None
    with Synthesizer(tiny_bundle, device="cpu", cache=cache):
        pass
    assert read_stages(cache, tiny_bundle.digest) is not None, "made again"
