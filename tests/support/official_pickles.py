"""Small checkpoints in the form of the official code: the same persisted objects, names and options."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dermis.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig

CONFIG = GeneratorConfig(
    16, 2, z_dim=8, w_dim=12, mapping_layers=3, channel_base=256, channel_max=16, num_fp16_res=2, conv_clamp=256
)
D_CONFIG = DiscriminatorConfig(16, 2, channel_base=256, channel_max=16, num_fp16_res=2, conv_clamp=256)
SOURCE = '''
"""Networks."""
import numpy as np
import torch
from torch_utils import misc, persistence
from torch_utils.ops import bias_act

#----------------------------------------------------------------------------

@misc.profiled_function
def scaled(x, dim=1, eps=1e-8, taps=[1,3,3,1], **kwargs):
    return x * torch.rsqrt(x.square().mean(dim) + eps)

@persistence.persistent_class
class Generator(torch.nn.Module):
    def __init__(self, z_dim, mapping_kwargs = {}, *, lr: float = -1.5):
        super().__init__()
        self.gain = lr / np.sqrt(z_dim)
'''
AUGMENT_SOURCE = """
import scipy.signal
import torch
from torch_utils import persistence, misc
from torch_utils.ops import upfirdn2d, grid_sample_gradfix, conv2d_gradfix

wavelets = {
    'haar': [0.7071067811865476, 0.7071067811865476],
    'sym2': [-0.12940952255092145, 0.22414386804185735],
}

def matrix(*rows, device=None):
    return torch.stack([torch.as_tensor(row, device=device) for row in rows])

@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    def __init__(self, xflip=0, imgfilter_bands=[1,1,1,1]):
        super().__init__()
        self.register_buffer('p', torch.ones([]))
"""
ATTRIBUTES = (
    "num_ws", "num_layers", "in_channels", "resolution", "activation", "up", "down", "conv_clamp", "use_fp16",
    "num_conv", "weight_gain", "bias_gain",
)  # fmt: skip


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the file was executed")


class EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict."""


@pytest.fixture(autouse=True)
def _official_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the stand-ins the names that pickles of the official code refer to."""
    for name, part in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
        module = types.ModuleType(name)
        monkeypatch.setattr(part, "__module__", name)
        setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    yield


class Persisted:
    """An object that pickles as the official persistence does."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = SOURCE) -> None:
        self.meta: dict[str, Any] = {
            "type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state,
        }  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.meta["state"]
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


def persisted(module: nn.Module, **state: Any) -> Persisted:
    """A network of dermis in the form that the official code would give it."""
    attributes = {key: getattr(module, key) for key in ATTRIBUTES if hasattr(module, key)}
    attributes |= {key: np.float64(value) for key, value in attributes.items() if key == "weight_gain"}
    state = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict((name, persisted(child)) for name, child in module.named_children()),
        **attributes,
        **state,
    }
    return Persisted(type(module).__name__, state)


def generator(config: GeneratorConfig = CONFIG, **changes: Any) -> Persisted:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {
        "c_dim": config.c_dim, "img_resolution": config.img_resolution, "img_channels": 3,
        "z_dim": config.z_dim, "w_dim": np.int64(config.w_dim),
        "mapping_kwargs": EasyDict(num_layers=config.mapping_layers),
        "synthesis_kwargs": EasyDict(
            channel_base=config.channel_base, channel_max=config.channel_max,
            num_fp16_res=config.num_fp16_res, conv_clamp=config.conv_clamp,
        ),
    }  # fmt: skip
    network = Generator(config)
    network.mapping.w_avg.normal_()
    return persisted(network, _init_args=(), _init_kwargs=kwargs | changes, img_resolution=config.img_resolution)


def stylegan3_repository_generator(network: Generator, **changes: Any) -> Persisted:
    """The form that the StyleGAN3 repository writes with --cfg=stylegan2: the options of the synthesis network are flat."""
    config = network.config
    kwargs: dict[str, Any] = {
        "z_dim": config.z_dim, "c_dim": config.c_dim, "w_dim": config.w_dim, "img_resolution": config.img_resolution,
        "img_channels": config.img_channels, "mapping_kwargs": EasyDict(num_layers=config.mapping_layers),
        "channel_base": config.channel_base, "channel_max": config.channel_max, "num_fp16_res": config.num_fp16_res,
        "conv_clamp": config.conv_clamp, "fused_modconv_default": "inference_only",
    }  # fmt: skip
    return persisted(network, _init_args=(), _init_kwargs=EasyDict(kwargs | changes))


def converted_discriminator(network: Discriminator, **changes: Any) -> Persisted:
    """The form that the official conversion from TensorFlow writes: a mapping network without layers."""
    config = network.config
    kwargs: dict[str, Any] = {
        "c_dim": config.c_dim, "img_resolution": config.img_resolution, "img_channels": 3, "architecture": "resnet",
        "channel_base": config.channel_base, "channel_max": config.channel_max, "num_fp16_res": config.num_fp16_res,
        "conv_clamp": config.conv_clamp, "cmap_dim": None,
        "block_kwargs": EasyDict(activation="lrelu", resample_filter=[1, 3, 3, 1], freeze_layers=0),
        "mapping_kwargs": EasyDict(
            num_layers=0, embed_features=None, layer_features=None, activation="lrelu", lr_multiplier=0.1
        ),
        "epilogue_kwargs": EasyDict(mbstd_group_size=None, mbstd_num_channels=1, activation="lrelu"),
    }  # fmt: skip
    return persisted(network, _init_args=(), _init_kwargs=kwargs | changes)


def discriminator(config: DiscriminatorConfig = D_CONFIG, **changes: Any) -> Persisted:
    torch.manual_seed(1)
    kwargs: dict[str, Any] = {
        "c_dim": config.c_dim, "img_resolution": config.img_resolution, "img_channels": 3,
        "channel_base": config.channel_base, "channel_max": config.channel_max, "num_fp16_res": config.num_fp16_res,
        "conv_clamp": config.conv_clamp, "epilogue_kwargs": EasyDict(mbstd_group_size=4),
        "block_kwargs": EasyDict(freeze_layers=0), "mapping_kwargs": EasyDict(),
    }  # fmt: skip
    return persisted(Discriminator(config), _init_args=(), _init_kwargs=kwargs | changes)


def snapshot(**parts: Any) -> dict[str, Any]:
    pipe = Persisted("AugmentPipe", {"p": 0.5, "_buffers": OrderedDict(p=torch.ones(()), h=np.ones(3))}, AUGMENT_SOURCE)
    kwargs = EasyDict(class_name="training.dataset.ImageFolderDataset", path="/home/someone/isic.zip", use_labels=True)
    return {
        "G": generator(), "D": discriminator(), "G_ema": generator(), "augment_pipe": pipe,
        "training_set_kwargs": kwargs, **parts,
    }  # fmt: skip


def save(folder: Path, value: Any, protocol: int = 4) -> Path:
    path = folder / "network-snapshot-000120.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path
