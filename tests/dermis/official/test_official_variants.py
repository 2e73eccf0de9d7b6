"""Tests of networks from all repositories with the official format: values equal the papers' formulas, or a refusal."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stylegan2_reference as reference
from dermis.bundle import load_discriminator, open_bundle, write_bundle
from dermis.errors import BundleError
from dermis.networks import Discriminator, Generator, GeneratorConfig, one_hot
from dermis.official.convert import build_networks, read_official
from dermis.official.stored import write_stored
from official_pickles import (
    CONFIG,
    D_CONFIG,
    EasyDict,
    Persisted,
    _official_names,  # noqa: F401
    converted_discriminator,
    generator,
    save,
    snapshot,
    stylegan3_repository_generator,
)
from training.gan.config import auto_config
from training.gan.state import new_state
from training.gan.transfer import read_source, transfer

TF_CONFIG = replace(D_CONFIG, mapping_layers=0, mapping_lr_multiplier=0.1, mbstd_group_size=None)


def _random(network: nn.Module) -> Any:
    """Every weight, bias and noise strength away from its neutral value."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in network.named_buffers():
            if not name.endswith("resample_filter"):
                buffer.normal_()
    return network.eval()


def _generator_of(tmp_path: Path, stored: Persisted) -> Generator:
    return read_official(save(tmp_path, {"G": None, "D": None, "G_ema": stored})).generator


def _agrees(ours: Generator, theirs: Generator) -> None:
    config = theirs.config
    z = torch.randn(3, config.z_dim)
    c = one_hot([index % max(config.c_dim, 1) for index in range(3)], config.c_dim)
    expected = reference.generator(theirs.state_dict(), z, c, config.conv_clamp, config.mapping_lr_multiplier, 0.7)
    image = ours(z, c, truncation_psi=0.7, noise_mode="const")
    assert expected.std() > 0.1 and (image - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, c_dim=0, conv_clamp=None, num_fp16_res=0),
        replace(CONFIG, mapping_layers=1, num_fp16_res=20, conv_clamp=0.5),
        replace(CONFIG, img_resolution=32, channel_base=512),
    ],
)
def test_stylegan3_repository_generators_give_values_of_paper(tmp_path: Path, config: GeneratorConfig) -> None:
    theirs = _random(Generator(config))
    ours = _generator_of(tmp_path, stylegan3_repository_generator(theirs))
    assert ours.config == config
    _agrees(ours, theirs)


def test_frozen_layers_of_mapping_network_are_read_from_buffers(tmp_path: Path) -> None:
    theirs = _random(Generator(CONFIG))
    options = EasyDict(num_layers=3, freeze_layers=2, freeze_embed=True)
    stored = stylegan3_repository_generator(theirs, mapping_kwargs=options)
    for name in ("embed", "fc0", "fc1"):
        state = stored.state["_modules"]["mapping"].state["_modules"][name].state
        state["_buffers"] |= {key: state["_parameters"].pop(key).detach() for key in ("weight", "bias")}
    _agrees(_generator_of(tmp_path, stored), theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"synthesis_kwargs": None, "mapping_kwargs": {"num_layers": 3, "embed_features": None, "layer_features": None}},
        {"architecture": "skip", "resample_filter": [1, 3, 3, 1], "activation": "lrelu", "use_noise": True},
        {"fused_modconv_default": None, "fp16_channels_last": True},
        {"mapping_kwargs": EasyDict(num_layers=3, activation="lrelu", lr_multiplier=0.01, w_avg_beta=0.998)},
    ],
)
def test_ineffective_or_supported_network_options_are_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    beta = 0.998 if "w_avg_beta" in (changes.get("mapping_kwargs") or {}) else 0.995
    theirs = _random(Generator(replace(CONFIG, w_avg_beta=beta)))
    _agrees(_generator_of(tmp_path, stylegan3_repository_generator(theirs, **changes)), theirs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet"}, "architecture='resnet'"),
        ({"resample_filter": None}, "resample_filter=None"),
        ({"use_noise": False}, "use_noise=False"),
        ({"channel_base": None}, "channel_base=None"),
        ({"num_fp16_res": None}, "num_fp16_res=None"),
        ({"mapping_kwargs": {"num_layers": 0}}, "num_layers=0"),
        ({"mapping_kwargs": {"num_layers": 3, "w_avg_beta": None}}, "w_avg_beta=None"),
        ({"extended_sgan2": True}, "extended_sgan2=True"),
        ({"magnitude_ema_beta": 0.99}, "magnitude_ema_beta=0.99.*StyleGAN3 networks are not supported"),
        ({"synthesis_kwargs": {"channel_base": 512}}, "channel_base is both 256 and 512"),
        ({"\x1b[2J": "\x1b" * 1000}, r"\\x1b\[2J='(\\x1b){10}"),
    ],
)
def test_unsupported_network_option_is_refused_with_its_value(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stored = stylegan3_repository_generator(Generator(CONFIG), **changes)
    with pytest.raises(BundleError, match=message) as caught:
        _generator_of(tmp_path, stored)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize(("channels", "kind"), [(1, "grey"), (4, "RGBA")])
def test_generator_without_three_channels_is_refused_at_import(tmp_path: Path, channels: int, kind: str) -> None:
    stored = stylegan3_repository_generator(Generator(replace(CONFIG, img_channels=channels)))
    with pytest.raises(BundleError, match=f"img_channels={channels} is not supported.*{kind}.*RGB"):
        _generator_of(tmp_path, stored)


def _stylegan3(synthesis: dict[str, Any]) -> Persisted:
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    children = {name: Persisted(kind, {**empty}) for name, kind in synthesis.items()}
    parts = {"synthesis": Persisted("SynthesisNetwork", {**empty, "_modules": children})}
    return Persisted("Generator", {**empty, "_modules": parts, "_init_args": (), "_init_kwargs": {"z_dim": 512}})


@pytest.mark.parametrize("synthesis", [{"input": "SynthesisInput"}, {"L0_36_512": "SynthesisLayer"}])
def test_stylegan3_is_refused_by_its_name(tmp_path: Path, synthesis: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="StyleGAN3 networks are not supported.*supported are.*--cfg=stylegan2"):
        _generator_of(tmp_path, _stylegan3(synthesis))


# -- discriminators converted from TensorFlow


def _converted(tmp_path: Path, **changes: Any) -> tuple[Path, Discriminator]:
    theirs = _random(Discriminator(TF_CONFIG))
    return save(tmp_path, snapshot(D=converted_discriminator(theirs, **changes))), theirs


def test_a_converted_discriminator_gives_the_papers_values(tmp_path: Path) -> None:
    path, theirs = _converted(tmp_path)
    read = read_official(path)
    assert read.discriminator is not None and read.discriminator.config == TF_CONFIG
    images, c = torch.randn(4, 3, 16, 16), one_hot([0, 1, 1, 0], 2)
    expected = reference.discriminator(theirs.state_dict(), images, c, TF_CONFIG.conv_clamp, group=4)
    assert expected.std() > 0.1 and (read.discriminator(images, c) - expected).abs().max() < 1e-4
    names = ("benign", "malignant")
    bundle = write_bundle(
        tmp_path / "bundle", name="x", generator=read.generator, discriminator=read.discriminator, class_names=names,
        provenance={}, model_card="# x\n",
    )  # fmt: skip
    again = load_discriminator(open_bundle(bundle.location))
    assert torch.equal(again(images, c), read.discriminator(images, c))


@pytest.mark.parametrize(("layers", "least"), [(0, 1.0), (8, 0.7)])
def test_training_starts_from_weights_of_converted_discriminator(tmp_path: Path, layers: int, least: float) -> None:
    path, theirs = _converted(tmp_path)
    small = {"z_dim": 8, "w_dim": 12, "channel_base": 256, "channel_max": 16, "batch": 4, "mapping_layers": 3}
    state = new_state(auto_config(16, 2, discriminator_mapping_layers=layers, **small), torch.device("cpu"))
    _, taken = transfer(read_source(path), state)
    assert taken.share >= least and all(name.startswith("mapping.") for name in taken.not_copied)
    assert all("(--discriminator-mapping-layers)" in reason for reason in taken.not_copied.values())
    assert isinstance(state.D, Discriminator)
    if layers == 0:
        images, c = torch.randn(4, 3, 16, 16), one_hot([0, 1, 1, 0], 2)
        assert torch.equal(state.D.eval()(images, c), theirs(images, c))


def test_weights_are_rescaled_to_other_learning_rate_multiplier(tmp_path: Path) -> None:
    theirs = _random(Generator(replace(CONFIG, mapping_lr_multiplier=0.1, num_fp16_res=0)))
    options = EasyDict(num_layers=3, lr_multiplier=0.1)
    path = save(tmp_path, {"G_ema": stylegan3_repository_generator(theirs, mapping_kwargs=options)})
    small = {"z_dim": 8, "w_dim": 12, "channel_base": 256, "channel_max": 16, "batch": 4, "mapping_layers": 3}
    state = new_state(auto_config(16, 2, **small), torch.device("cpu"))
    assert transfer(read_source(path), state)[0].share == 1.0
    z, c = torch.randn(2, 8), one_hot([0, 1], 2)
    assert torch.allclose(state.G_ema.mapping(z, c), theirs.mapping(z, c), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "skip"}, "architecture='skip'"),
        ({"mapping_kwargs": {"num_layers": 0, "embed_features": 8}}, "embed_features must be cmap_dim, 16; got 8"),
        ({"epilogue_kwargs": {"mbstd_group_size": 0}}, "mbstd_group_size=0"),
        ({"cmap_dim": 0}, "cmap_dim"),
    ],
)
def test_a_discriminator_that_is_left_out_names_the_option(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    read = read_official(_converted(tmp_path, **changes)[0])
    assert read.discriminator is None and message in read.no_discriminator


UNCONDITIONAL: dict[str, Callable[[], dict[str, Any]]] = {
    "without labels, with mapping options": lambda: {"c_dim": 0},
    "without options": lambda: {"c_dim": 0, "block_kwargs": None, "mapping_kwargs": None, "epilogue_kwargs": {}},
}


@pytest.mark.parametrize("case", UNCONDITIONAL)
def test_an_unconditional_discriminator_needs_no_mapping(tmp_path: Path, case: str) -> None:
    theirs = _random(Discriminator(replace(TF_CONFIG, c_dim=0, mapping_layers=8)))
    config = replace(CONFIG, c_dim=0)
    parts = {"G_ema": generator(config), "D": converted_discriminator(theirs, **UNCONDITIONAL[case]())}
    read = read_official(save(tmp_path, parts))
    assert read.discriminator is not None, read.no_discriminator
    images = torch.randn(4, 3, 16, 16)
    expected = reference.discriminator(theirs.state_dict(), images, torch.zeros(4, 0), TF_CONFIG.conv_clamp, group=4)
    assert (read.discriminator(images, None) - expected).abs().max() < 1e-4


def test_discriminator_with_labels_unlike_generator_is_left_out(tmp_path: Path) -> None:
    other = converted_discriminator(Discriminator(replace(TF_CONFIG, c_dim=3)))
    read = read_official(save(tmp_path, {"G_ema": generator(), "D": other}))
    assert read.discriminator is None and "c_dim=3 differs from that of the generator, 2" in read.no_discriminator


# -- values of any kind anywhere

ODD: list[Any] = [
    None, True, -1, 0, 2**31, -(10**5000), 1e308, float("nan"), "", "\x1b[2J", "\udc80", "x" * 5000, b"x", [], [[]], {"a": {}},
    EasyDict(num_layers=0), np.int64(8), np.float32("nan"), np.zeros(3), torch.zeros(()), torch.zeros(0), torch.zeros(3, 3),
    torch.zeros(2, dtype=torch.int64), torch.zeros(1).expand(16, 16, 3, 3), torch.float32, torch.Size([1]),
]  # fmt: skip


def _dictionaries(value: Any) -> list[dict[Any, Any]]:
    value = value.meta if isinstance(value, Persisted) else value
    below = [_dictionaries(item) for item in value.values()] if isinstance(value, dict) else []
    return [value, *itertools.chain(*below)] if isinstance(value, dict) else []


def test_unexpected_value_gives_bundle_error_or_generator(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "x.pkl"
    for index in range(120):
        file = {
            "G_ema": generator(replace(CONFIG, img_resolution=8, mapping_layers=1)),
            "D": None,
            "training_set_kwargs": {},
        }
        places = [place for place in _dictionaries(file) if place]
        place = places[random.integers(len(places))]
        place[list(place)[random.integers(len(place))]] = ODD[index % len(ODD)]
        path.write_bytes(pickle.dumps(file, protocol=4))
        try:
            write_stored(path, "G_ema", tmp_path)  # without a process: these are many files
            assert isinstance(build_networks(tmp_path, "G_ema").generator, Generator)
        except BundleError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
