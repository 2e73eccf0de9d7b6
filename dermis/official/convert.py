"""From an official checkpoint to dermis's networks: configuration, cross-checks, weights.

An option is what the file's constructor arguments say, else what the stored module says of itself, else the official
default. Then the network is built without memory, and every stored attribute and every shape must agree with it:
a checkpoint that the networks here would compute differently is refused, not approximated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from dermis.errors import BundleError
from dermis.networks import FIR_TAPS, Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, fir_filter
from dermis.official.persisted import (
    Checkpoint,
    Module,
    mapping,
    module,
    plain,
    read_checkpoint,
    shape,
    tensor,
    tensors,
)

NetworkName = Literal["G_ema", "G"]
Network = TypeVar("Network", Generator, Discriminator)

MAX_FILE_BYTES = 4 << 30  # an official 1024 px snapshot has 380 MB
_FIXED = {
    "activation": "lrelu",
    "resample_filter": [int(tap) for tap in FIR_TAPS],
    "use_noise": True,
    "kernel_size": 3,
}
_WITHOUT_EFFECT = frozenset({"fp16_channels_last", "fused_modconv_default", "freeze_layers"})  # layout, speed, training
_GENERATOR_ARGUMENTS = (
    "z_dim",
    "c_dim",
    "w_dim",
    "img_resolution",
    "img_channels",
    "mapping_kwargs",
    "synthesis_kwargs",
)
_DISCRIMINATOR_ARGUMENTS = (
    "c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max", "num_fp16_res",
    "conv_clamp", "cmap_dim", "block_kwargs", "mapping_kwargs", "epilogue_kwargs",
)  # fmt: skip
_COMPARED = (
    "z_dim", "c_dim", "w_dim", "num_ws", "num_layers", "w_avg_beta", "in_channels", "resolution", "cmap_dim",
    "activation", "up", "down", "conv_clamp", "use_fp16", "num_conv", "weight_gain", "bias_gain", "padding",
)  # fmt: skip
_EXPECTED = {"act_gain": math.sqrt(2.0), "use_noise": True}


class UnsupportedNetworkError(BundleError):
    """The checkpoint is sound, but `dermis.networks` cannot compute this network."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What was read from an official pickle."""

    generator: Generator
    discriminator: Discriminator | None
    no_discriminator: str
    """Why there is no discriminator; empty if there is one."""
    training_set: Mapping[str, Any]
    """training_set_kwargs, as far as its values are text or numbers."""
    sha256: str


def read_official(path: str | Path, network: NetworkName = "G_ema") -> OfficialCheckpoint:
    """Read a StyleGAN2-ADA (PyTorch) `.pkl` without executing anything in it.

    The networks come in float32 and eval mode, without gradients. Raises `BundleError`, naming the file, if it is
    unreadable, unsafe, or holds a generator that `dermis.networks` does not compute as the official code does. A
    discriminator of another architecture is left out and `no_discriminator` says why.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{path}: is larger than {MAX_FILE_BYTES:,} bytes; this is no StyleGAN2-ADA checkpoint")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        checkpoint = read_checkpoint(data)
        if checkpoint.values.get(network) is None:
            there = ", ".join(sorted(checkpoint.values)) or "nothing"
            raise BundleError(f"has no {network} (it holds {there}); choose another network or file")
        generator = _network(checkpoint, module(checkpoint.values[network], network), network, len(data), Generator)
        discriminator, reason = None, "it holds none"
        if checkpoint.values.get("D") is not None:
            try:
                discriminator = _network(checkpoint, module(checkpoint.values["D"], "D"), "D", len(data), Discriminator)
                reason = ""
            except UnsupportedNetworkError as error:
                reason = str(error)
        training_set = _training_set(checkpoint.values.get("training_set_kwargs"))
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    except (RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise BundleError(f"{path}: is damaged or tampered with ({type(error).__name__})") from None
    return OfficialCheckpoint(generator, discriminator, reason, training_set, hashlib.sha256(data).hexdigest())


def _training_set(record: Any) -> dict[str, Any]:
    options = mapping(record, "training_set_kwargs") if record is not None else {}
    return {key: value for key, value in options.items() if isinstance(value, str | int | float)}


def _network(checkpoint: Checkpoint, root: Module, what: str, file_bytes: int, kind: type[Network]) -> Network:
    if root.class_name != kind.__name__:
        raise BundleError(f"{what} is a {root.class_name}, not a {kind.__name__}; the file is damaged or tampered with")
    try:
        config: Any = _generator_config(root, what) if kind is Generator else _discriminator_config(root, what)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedNetworkError(f"{what}: {error}") from None
    try:
        with torch.device("meta"):
            model = kind(config)
    except (RuntimeError, ArithmeticError) as error:
        raise UnsupportedNetworkError(f"{what}: its options make impossible tensors ({error})") from None
    records = tensors(root)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: shape(record, f"{what}.{key}") for key, record in records.items()}
    if odd := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        message = f"{odd[0]} is {found.get(odd[0], 'absent')}, its options say {expected.get(odd[0], 'absent')}"
        raise UnsupportedNetworkError(f"{what}: {len(odd)} tensors do not fit the official networks: {message}")
    if sum(math.prod(size) for size in found.values()) > file_bytes:
        raise BundleError(f"{what}: the file is too small for its tensors; it is damaged or tampered with")
    _check_attributes(model, root, what)
    state = {key: tensor(checkpoint, record, f"{what}.{key}") for key, record in records.items()}
    for key, value in state.items():
        if key.endswith("resample_filter") and not torch.allclose(value, fir_filter(), atol=1e-6):
            raise UnsupportedNetworkError(
                f"{what}: {key} is not the filter {_FIXED['resample_filter']} that is supported"
            )
        if not torch.isfinite(value).all():
            raise BundleError(
                f"{what}: {key} holds values that are not finite; the training diverged, take another file"
            )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _check_attributes(model: nn.Module, root: Module, what: str) -> None:
    """Every attribute that decides the arithmetic must be, in the file, what the network here has."""
    for name, ours in model.named_modules():
        theirs = _descend(root, name)
        wanted = {key: getattr(ours, key) for key in _COMPARED if hasattr(ours, key)} | _EXPECTED
        wanted |= {"architecture": "skip" if isinstance(model, Generator) else "resnet"}
        for key, value in wanted.items():
            if key not in theirs.state:
                continue
            stored = theirs.plain(key)
            same = math.isclose(stored, value) if isinstance(stored, float) and isinstance(value, float) else None
            linear = key == "act_gain" and stored == 1 and theirs.state.get("activation") == "linear"
            if not linear and not (same if same is not None else stored == value):
                label = ".".join(filter(None, (what, name, key)))
                raise UnsupportedNetworkError(
                    f"{label} is {stored!r:.50} in the file; dermis computes it with {value!r}"
                )


def _descend(root: Module, name: str) -> Module:
    for part in filter(None, name.split(".")):
        root = module(root.children().get(part), name)
    return root


# -- configuration


def _generator_config(root: Module, what: str) -> GeneratorConfig:
    given = _arguments(root, _GENERATOR_ARGUMENTS)
    _check_options(what, given, _GENERATOR_ARGUMENTS)
    synthesis = _nested(what, given, "synthesis_kwargs", ("channel_base", "channel_max", "num_fp16_res", "conv_clamp"))
    blocks = [child for key, child in _children(root, "synthesis").items() if key.startswith("b")]
    return GeneratorConfig(
        img_resolution=_integer(what, "img_resolution", _given(given, root, "img_resolution", None)),
        c_dim=_integer(what, "c_dim", _given(given, root, "c_dim", None)),
        z_dim=_integer(what, "z_dim", _given(given, root, "z_dim", None)),
        w_dim=_integer(what, "w_dim", _given(given, root, "w_dim", None)),
        img_channels=_integer(what, "img_channels", _given(given, root, "img_channels", 3)),
        w_avg_beta=_number(what, "w_avg_beta", _mapping_option(what, given, root, "w_avg_beta", 0.995)),
        **_width(what, synthesis, blocks, "conv1"),
        **_mapping(what, given, root),
    )


def _discriminator_config(root: Module, what: str) -> DiscriminatorConfig:
    given = _arguments(root, _DISCRIMINATOR_ARGUMENTS)
    _check_options(what, given, _DISCRIMINATOR_ARGUMENTS)
    if given.get("architecture", "resnet") != "resnet":
        raise UnsupportedNetworkError(
            f"{what}: architecture={given['architecture']!r:.50} is not supported, only 'resnet'"
        )
    _nested(what, given, "block_kwargs", ())
    epilogue = _nested(what, given, "epilogue_kwargs", ("mbstd_group_size", "mbstd_num_channels"))
    children = root.children()
    blocks = [module(child, key) for key, child in children.items() if key.startswith("b") and key != "b4"]
    std = _children(root, "b4").get("mbstd")
    group = epilogue.get("mbstd_group_size", _attribute(std, "group_size", 4))
    cmap_dim = given.get("cmap_dim")
    return DiscriminatorConfig(
        img_resolution=_integer(what, "img_resolution", _given(given, root, "img_resolution", None)),
        c_dim=_integer(what, "c_dim", _given(given, root, "c_dim", None)),
        img_channels=_integer(what, "img_channels", _given(given, root, "img_channels", 3)),
        cmap_dim=None if cmap_dim is None else _integer(what, "cmap_dim", cmap_dim),
        mbstd_group_size=None if group is None else _integer(what, "mbstd_group_size", group, least=1),
        mbstd_num_channels=_integer(
            what, "mbstd_num_channels", epilogue.get("mbstd_num_channels", _attribute(std, "num_channels", 1))
        ),
        **_width(what, given, blocks, "conv0"),
        **(_mapping(what, given, root) if "mapping" in children else {}),
    )


def _width(what: str, given: Mapping[str, Any], blocks: Sequence[Module], layer: str) -> dict[str, Any]:
    clamps = [_attribute(block.children().get(layer), "conv_clamp", None) for block in blocks]
    clamp = given.get("conv_clamp", clamps[0] if clamps else None)
    halves = given.get("num_fp16_res", sum(block.plain("use_fp16") is True for block in blocks))
    return {
        "channel_base": _integer(what, "channel_base", given.get("channel_base", 32768), least=1),
        "channel_max": _integer(what, "channel_max", given.get("channel_max", 512), least=1),
        "num_fp16_res": _integer(what, "num_fp16_res", halves),
        "conv_clamp": None if clamp is None else _number(what, "conv_clamp", clamp),
    }


def _mapping(what: str, given: Mapping[str, Any], root: Module) -> dict[str, Any]:
    first = _children(root, "mapping").get("fc0")
    options = _nested(
        what, given, "mapping_kwargs", ("num_layers", "embed_features", "layer_features", "lr_multiplier", "w_avg_beta")
    )
    layers = _integer(what, "num_layers", _mapping_option(what, given, root, "num_layers", 8), least=1)
    multiplier = options.get("lr_multiplier", _attribute(first, "bias_gain", 0.01))
    sizes = {key: options.get(key) for key in ("embed_features", "layer_features")}
    return {
        "mapping_layers": layers,
        "mapping_lr_multiplier": _number(what, "lr_multiplier", multiplier),
        **{key: None if size is None else _integer(what, key, size, least=1) for key, size in sizes.items()},
    }


def _mapping_option(what: str, given: Mapping[str, Any], root: Module, key: str, default: Any) -> Any:
    options = given.get("mapping_kwargs") or {}
    return options.get(key, _attribute(root.children().get("mapping"), key, default))


def _arguments(root: Module, names: Sequence[str]) -> dict[str, Any]:
    """The constructor's arguments by name."""
    positional = plain(root.state.get("_init_args", ()))
    named = plain(root.state.get("_init_kwargs", {}))
    if not isinstance(positional, list) or not isinstance(named, dict) or len(positional) > len(names):
        raise BundleError("_init_args or _init_kwargs are malformed; the file is damaged or tampered with")
    return {**dict(zip(names, positional, strict=False)), **named}


def _check_options(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key, value in given.items():
        if key in _FIXED:
            if value != _FIXED[key]:
                message = f"{where}: {key}={value!r:.50} is not supported, only {_FIXED[key]!r}"
                raise UnsupportedNetworkError(message)
        elif key not in known and key not in _WITHOUT_EFFECT:
            raise UnsupportedNetworkError(f"{where}: the option {key!r:.50} is not supported")


def _nested(what: str, given: Mapping[str, Any], key: str, known: Sequence[str]) -> dict[str, Any]:
    options = given.get(key) or {}
    if not isinstance(options, dict):
        raise BundleError(f"{what}: {key} is no dictionary; the file is damaged or tampered with")
    options = dict(options)
    architecture = options.pop("architecture", "skip")
    if architecture != "skip":
        raise UnsupportedNetworkError(f"{what}: {key}.architecture={architecture!r:.50} is not supported, only 'skip'")
    _check_options(f"{what}.{key}", options, known)
    return options


def _children(root: Module, name: str) -> dict[str, Any]:
    """Children of a child; {} if there is no such child. Persisted blocks come as `Module`s, the rest as it is."""
    child = root.children().get(name)
    if child is None:
        return {}
    found = module(child, name).children()
    return {key: module(value, f"{name}.{key}") for key, value in found.items()}


def _attribute(record: Any, name: str, default: Any) -> Any:
    if record is None:
        return default
    state = (record if isinstance(record, Module) else module(record, name)).state
    return plain(state[name]) if name in state else default


def _given(given: Mapping[str, Any], root: Module, key: str, default: Any) -> Any:
    value = given.get(key, root.plain(key))
    return default if value is None else value


def _integer(what: str, name: str, value: Any, least: int = 0) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())
    if not whole or not least <= value < 2**31:
        raise UnsupportedNetworkError(f"{what}: {name}={value!r:.50} must be a whole number of at least {least}")
    return int(value)


def _number(what: str, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UnsupportedNetworkError(f"{what}: {name}={value!r:.50} must be a number")
    return float(value)
