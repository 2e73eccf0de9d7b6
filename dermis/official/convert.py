"""Convert an official checkpoint to dermis's networks: configuration, checks and weights.

An option is taken from the constructor arguments in the file; if it is not there, from the attributes of the stored module;
otherwise it has the official default. Then the network is built without memory, and every stored attribute and shape must
agree with it: a checkpoint that the networks here would compute differently is refused, not approximated.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dermis.errors import BundleError, escape, quote
from dermis.limited import ProcessLimits
from dermis.networks import FIR_TAPS, Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, fir_filter
from dermis.official.isolation import DEFAULT_LIMITS, store_isolated
from dermis.official.persisted import NO_STYLEGAN3
from dermis.official.stored import StoredCheckpoint, StoredNetwork, read_stored, weights_file

NetworkName = Literal["G_ema", "G"]
Network = TypeVar("Network", Generator, Discriminator)

_FIXED = {
    "activation": "lrelu",
    "resample_filter": [int(tap) for tap in FIR_TAPS],
    "use_noise": True,
    "kernel_size": 3,
}
_WITHOUT_EFFECT = frozenset({
    "fp16_channels_last", "fused_modconv_default",  # layout and speed
    "freeze_layers", "freeze_embed",  # options of training; frozen weights are buffers, which are read like parameters
})  # fmt: skip
_STYLEGAN3_OPTIONS = frozenset({
    "conv_kernel", "filter_size", "first_cutoff", "first_stopband", "last_stopband_rel", "lrelu_upsampling",
    "magnitude_ema_beta", "margin_size", "num_critical", "output_scale", "use_radial_filters",
})  # fmt: skip
_GENERATOR_ARGUMENTS = (
    "z_dim",
    "c_dim",
    "w_dim",
    "img_resolution",
    "img_channels",
    "mapping_kwargs",
    "synthesis_kwargs",
)
_SYNTHESIS_OPTIONS = ("channel_base", "channel_max", "num_fp16_res", "conv_clamp")
_DISCRIMINATOR_ARGUMENTS = (
    "c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max", "num_fp16_res",
    "conv_clamp", "cmap_dim", "block_kwargs", "mapping_kwargs", "epilogue_kwargs",
)  # fmt: skip
_COMPARED = (
    "z_dim", "c_dim", "w_dim", "num_ws", "num_layers", "w_avg_beta", "in_channels", "resolution", "cmap_dim",
    "activation", "up", "down", "conv_clamp", "use_fp16", "num_conv", "weight_gain", "bias_gain", "padding",
)  # fmt: skip
_EXPECTED = {"act_gain": math.sqrt(2.0), "use_noise": True}
_COLOURS = {1: "grey images", 2: "images of two channels", 4: "images with a fourth channel (RGBA)"}


class UnsupportedNetworkError(BundleError):
    """The checkpoint is valid, but `dermis.networks` cannot compute its network."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The content of an official pickle."""

    generator: Generator
    discriminator: Discriminator | None
    no_discriminator: str
    """Why there is no discriminator; empty if there is one."""
    training_set: Mapping[str, Any]
    """Values of training_set_kwargs that are texts or numbers."""
    sha256: str


def read_official(
    path: str | Path, network: NetworkName = "G_ema", limits: ProcessLimits = DEFAULT_LIMITS
) -> OfficialCheckpoint:
    """Read a StyleGAN2-ADA (PyTorch) `.pkl` without executing anything in it, in a separate process.

    Args:
        path: The file.
        network: The generator to read: the averaged one ("G_ema") or the trained one ("G").
        limits: Limits of reading; by default more than any official checkpoint needs.

    Returns:
        The networks in float32 and eval mode, without gradients. A discriminator of another architecture is left out, and
        `no_discriminator` says why.

    Raises:
        BundleError: The file is unreadable, unsafe, reaches a limit, or holds a generator that `dermis.networks` does not
            compute as the official code does. The message names the file.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix="dermis-import-") as folder:
            store_isolated(path, network, Path(folder), limits)
            return build_networks(Path(folder), network)
    except BundleError as error:
        raise BundleError(f"{escape(path, 1000)}: {error}") from None
    except OSError as error:
        raise BundleError(
            f"{escape(path, 1000)}: cannot be read by way of the temporary folder {tempfile.gettempdir()}: "
            f"{error.strerror}; set TMPDIR to another folder"
        ) from None


def build_networks(folder: Path, network: NetworkName) -> OfficialCheckpoint:
    """Build the networks of a checkpoint that `stored.write_stored` wrote into a folder.

    Raises:
        BundleError: A network cannot be built.
    """
    stored = read_stored(folder)
    generator = _network(stored, network, folder, Generator)
    discriminator, reason = None, "it holds none"
    if "D" in stored.networks:
        try:
            discriminator, reason = _network(stored, "D", folder, Discriminator), ""
            _check_pair(generator.config, discriminator.config)
        except UnsupportedNetworkError as error:
            discriminator, reason = None, str(error)
    return OfficialCheckpoint(generator, discriminator, reason, stored.training_set, stored.sha256)


def _check_pair(generator: GeneratorConfig, discriminator: DiscriminatorConfig) -> None:
    for name in ("img_resolution", "img_channels", "c_dim"):
        generator_value, discriminator_value = getattr(generator, name), getattr(discriminator, name)
        if generator_value != discriminator_value:
            raise UnsupportedNetworkError(
                f"D: {name}={discriminator_value} differs from that of the generator, {generator_value}"
            )


def _network(checkpoint: StoredCheckpoint, what: str, folder: Path, kind: type[Network]) -> Network:
    stored = checkpoint.networks[what]
    name = stored.modules[""].class_name
    if name != kind.__name__:
        raise BundleError(f"{what} is a {quote(name)}, not a {kind.__name__}; the file is damaged or tampered with")
    try:
        config: Any = _generator_config(stored, what) if kind is Generator else _discriminator_config(stored, what)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedNetworkError(f"{what}: {escape(error)}") from None
    try:
        with torch.device("meta"):  # without memory
            model = kind(config)
    except (RuntimeError, ArithmeticError) as error:
        raise UnsupportedNetworkError(f"{what}: its options make impossible tensors ({escape(error)})") from None
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = stored.shapes
    if odd := sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)):
        message = f"{odd[0]} is {shapes.get(odd[0], 'absent')}, its options say {expected.get(odd[0], 'absent')}"
        raise UnsupportedNetworkError(f"{what}: {len(odd)} tensors do not fit the official networks: {message}")
    _check_attributes(model, stored, what)
    weights = {
        key: value.clone() for key, value in load_file(weights_file(folder, what)).items()
    }  # copies, so that the file is no longer mapped
    _check_weights(weights, what)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _check_weights(weights: Mapping[str, Tensor], what: str) -> None:
    for key, value in weights.items():
        if key.endswith("resample_filter") and not torch.allclose(value, fir_filter(), atol=1e-6):
            raise UnsupportedNetworkError(
                f"{what}: {key} is not the filter {_FIXED['resample_filter']} that is supported"
            )
        if not torch.isfinite(value).all():
            raise BundleError(
                f"{what}: {key} holds values that are not finite; the training diverged, take another file"
            )


def _check_attributes(model: nn.Module, stored: StoredNetwork, what: str) -> None:
    """Check that every attribute that decides the arithmetic is the same in the file and in the network here."""
    for path, ours in model.named_modules():
        if path not in stored.modules:
            raise BundleError(f"{what}: has no module {path}; the file is damaged or tampered with")
        theirs = stored.modules[path].attributes
        expected = {key: getattr(ours, key) for key in _COMPARED if hasattr(ours, key)} | _EXPECTED
        expected |= {"architecture": "skip" if isinstance(model, Generator) else "resnet"}
        for key, value in expected.items():
            if key not in theirs:
                continue
            actual = theirs[key]
            same = math.isclose(actual, value) if isinstance(actual, float) and isinstance(value, float) else None
            linear = key == "act_gain" and actual == 1 and theirs.get("activation") == "linear"
            if not linear and not (same if same is not None else actual == value):
                label = ".".join(filter(None, (what, path, key)))
                raise UnsupportedNetworkError(f"{label}={quote(actual)} in the file is not supported, only {value!r}")


# -- configuration


def _generator_config(stored: StoredNetwork, what: str) -> GeneratorConfig:
    options = _arguments(stored, _GENERATOR_ARGUMENTS)
    # StyleGAN2-ADA passes the options of the synthesis network as a dictionary, the StyleGAN3 repository one by one.
    _check_options(what, options, (*_GENERATOR_ARGUMENTS, *_SYNTHESIS_OPTIONS), "skip")
    synthesis = _nested(what, options, "synthesis_kwargs", _SYNTHESIS_OPTIONS, "skip")
    flat = {key: options[key] for key in _SYNTHESIS_OPTIONS if key in options}
    for key in flat.keys() & synthesis.keys():
        if flat[key] != synthesis[key]:
            raise BundleError(
                f"{what}: {key} is both {quote(flat[key])} and {quote(synthesis[key])}; it is tampered with"
            )
    channels = _integer(what, "img_channels", _option(options, stored, "img_channels", 3))
    if channels != 3:
        makes = _COLOURS.get(channels, "images of another kind")
        raise UnsupportedNetworkError(
            f"{what}: img_channels={channels} is not supported, only 3: it makes {makes}, and dermis generates RGB images; "
            "train on RGB images"
        )
    blocks = [f"synthesis.{name}" for name in stored.children("synthesis") if name.startswith("b")]
    return GeneratorConfig(
        img_resolution=_integer(what, "img_resolution", _option(options, stored, "img_resolution", None)),
        c_dim=_integer(what, "c_dim", _option(options, stored, "c_dim", None)),
        z_dim=_integer(what, "z_dim", _option(options, stored, "z_dim", None)),
        w_dim=_integer(what, "w_dim", _option(options, stored, "w_dim", None)),
        img_channels=channels,
        w_avg_beta=_number(what, "w_avg_beta", _mapping_option(options, stored, "w_avg_beta", 0.995)),
        **_width(what, {**synthesis, **flat}, stored, blocks, "conv1"),
        **_mapping(what, options, stored, least=1),
    )


def _discriminator_config(stored: StoredNetwork, what: str) -> DiscriminatorConfig:
    options = _arguments(stored, _DISCRIMINATOR_ARGUMENTS)
    _check_options(what, options, _DISCRIMINATOR_ARGUMENTS, "resnet")
    _nested(what, options, "block_kwargs", (), "resnet")
    epilogue = _nested(what, options, "epilogue_kwargs", ("mbstd_group_size", "mbstd_num_channels"), "resnet")
    children = stored.children()
    blocks = [name for name in children if name.startswith("b") and name != "b4"]
    group = epilogue.get("mbstd_group_size", stored.attribute("b4.mbstd", "group_size", 4))
    maps = epilogue.get("mbstd_num_channels", stored.attribute("b4.mbstd", "num_channels", 1))
    cmap_dim = options.get("cmap_dim")
    return DiscriminatorConfig(
        img_resolution=_integer(what, "img_resolution", _option(options, stored, "img_resolution", None)),
        c_dim=_integer(what, "c_dim", _option(options, stored, "c_dim", None)),
        img_channels=_integer(what, "img_channels", _option(options, stored, "img_channels", 3)),
        cmap_dim=None if cmap_dim is None else _integer(what, "cmap_dim", cmap_dim),
        mbstd_group_size=None if group is None else _integer(what, "mbstd_group_size", group, least=1),
        mbstd_num_channels=_integer(what, "mbstd_num_channels", maps),
        **_width(what, options, stored, blocks, "conv0"),
        **(_mapping(what, options, stored, least=0) if "mapping" in children else {}),
    )


def _width(
    what: str, options: Mapping[str, Any], stored: StoredNetwork, blocks: Sequence[str], layer: str
) -> dict[str, Any]:
    clamps = [stored.attribute(f"{block}.{layer}", "conv_clamp") for block in blocks]
    clamp = options.get("conv_clamp", clamps[0] if clamps else None)
    halves = options.get("num_fp16_res", sum(stored.attribute(block, "use_fp16") is True for block in blocks))
    return {
        "channel_base": _integer(what, "channel_base", options.get("channel_base", 32768), least=1),
        "channel_max": _integer(what, "channel_max", options.get("channel_max", 512), least=1),
        "num_fp16_res": _integer(what, "num_fp16_res", halves),
        "conv_clamp": None if clamp is None else _number(what, "conv_clamp", clamp),
    }


def _mapping(what: str, arguments: Mapping[str, Any], stored: StoredNetwork, least: int) -> dict[str, Any]:
    """Return the options of the mapping network, which has at least `least` layers."""
    known = ("num_layers", "embed_features", "layer_features", "lr_multiplier", "w_avg_beta")
    options = _nested(what, arguments, "mapping_kwargs", known, None)
    layers = _integer(what, "num_layers", _mapping_option(arguments, stored, "num_layers", 8), least=least)
    multiplier = options.get("lr_multiplier", stored.attribute("mapping.fc0", "bias_gain", 0.01))
    sizes = {key: options.get(key) for key in ("embed_features", "layer_features")}
    return {
        "mapping_layers": layers,
        "mapping_lr_multiplier": _number(what, "lr_multiplier", multiplier),
        **{key: None if size is None else _integer(what, key, size, least=1) for key, size in sizes.items()},
    }


def _mapping_option(arguments: Mapping[str, Any], stored: StoredNetwork, key: str, default: Any) -> Any:
    options = arguments.get("mapping_kwargs")
    attribute = stored.attribute("mapping", key, default)
    return options.get(key, attribute) if isinstance(options, dict) else attribute


def _arguments(stored: StoredNetwork, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of the constructor by name."""
    if len(stored.positional) > len(names):
        raise BundleError(f"_init_args has more than {len(names)} arguments; the file is damaged or tampered with")
    return {**dict(zip(names, stored.positional, strict=False)), **stored.named}


def _check_options(where: str, options: Mapping[str, Any], known: Sequence[str], architecture: str | None) -> None:
    """Refuse options that the networks here do not support. `architecture` is the only allowed one of that option, if any."""
    fixed = _FIXED if architecture is None else {**_FIXED, "architecture": architecture}
    for key, value in options.items():
        if key in fixed:
            if value != fixed[key]:
                raise UnsupportedNetworkError(f"{where}: {key}={quote(value)} is not supported, only {fixed[key]!r}")
        elif key in _STYLEGAN3_OPTIONS:
            raise UnsupportedNetworkError(f"{where}: {key}={quote(value)}: {NO_STYLEGAN3}")
        elif key not in known and key not in _WITHOUT_EFFECT:
            raise UnsupportedNetworkError(f"{where}: the option {escape(key)}={quote(value)} is not supported")


def _nested(
    what: str, arguments: Mapping[str, Any], key: str, known: Sequence[str], architecture: str | None
) -> dict[str, Any]:
    """Return the options of a part of the network, which are in the constructor's argument `key`."""
    options = arguments.get(key)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise BundleError(f"{what}: {key}={quote(options)} is not a dictionary; the file is damaged or tampered with")
    _check_options(f"{what}: {key}", options, known, architecture)
    return {name: value for name, value in options.items() if name in known}


def _option(options: Mapping[str, Any], stored: StoredNetwork, key: str, default: Any) -> Any:
    value = options.get(key, stored.attribute("", key))
    return default if value is None else value


def _integer(what: str, name: str, value: Any, least: int = 0) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())
    if not whole or not least <= value < 2**31:
        raise UnsupportedNetworkError(f"{what}: {name}={quote(value)} must be a whole number of at least {least}")
    return int(value)


def _number(what: str, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UnsupportedNetworkError(f"{what}: {name}={quote(value)} must be a number")
    return float(value)
