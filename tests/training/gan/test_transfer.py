"""Tests of starting a run with the weights of another: the tensors that fit are copied, the others are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.bundle import Bundle, load_generator, open_bundle, write_bundle
from dermis.errors import BundleError, TrainingError
from dermis.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from training.data.images import ImageDataset
from training.gan.config import GanConfig, auto_config
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, write_snapshot
from training.gan.state import GanState, new_state
from training.gan.transfer import read_source, transfer

CPU = torch.device("cpu")
SMALL = {"z_dim": 16, "w_dim": 16, "channel_base": 256, "channel_max": 16, "batch": 4}


def _config(resolution: int = 16, c_dim: int = 2, **changes: object) -> GanConfig:
    return auto_config(resolution, c_dim, **(SMALL | {"total_kimg": 0.004} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A 16 px bundle with its discriminator."""
    torch.manual_seed(1)
    G = Generator(GeneratorConfig(16, 2, 16, 16, mapping_layers=2, channel_base=256, channel_max=16))
    D = Discriminator(DiscriminatorConfig(16, 2, channel_base=256, channel_max=16))
    names, out = ("benign", "malignant"), tmp_path_factory.mktemp("bundles") / "whole"
    return write_bundle(
        out, name="whole", generator=G, discriminator=D, class_names=names, provenance={}, model_card="# Whole\n"
    )


def test_all_weights_of_equal_network_are_transferred(whole: Bundle) -> None:
    source, state = read_source(Path(whole.location)), new_state(_config(), CPU)
    taken = transfer(source, state)
    assert [part.share for part in taken] == [1.0, 1.0] and not any(part.not_copied for part in taken)
    for ours, theirs in ((state.G, source.G), (state.G_ema, source.G), (state.D, source.D)):
        assert theirs is not None
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in state.G.parameters())
    assert state.progress.started_from["digest"] == whole.digest


@pytest.mark.parametrize(
    ("changes", "left", "reason"),
    [
        ({"resolution": 32}, "synthesis.b32.conv0.weight", "not in the source"),
        ({"resolution": 8}, "", ""),
        ({"c_dim": 3}, "mapping.embed.weight", "another shape"),
        ({"c_dim": 0}, "mapping.fc0.weight", "another shape"),
        ({"mapping_layers": 3}, "mapping.fc1.weight", "mapping has 2 layers and this one 3"),
    ],
)
def test_weights_that_do_not_fit_stay_new_and_are_reported(
    whole: Bundle, changes: dict[str, int], left: str, reason: str
) -> None:
    source, state = read_source(Path(whole.location)), new_state(_config(**changes), CPU)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in state.G.state_dict().items()}
    G, D = transfer(source, state)
    assert torch.equal(
        state.G.get_parameter("synthesis.b8.conv0.weight"), source.G.get_parameter("synthesis.b8.conv0.weight")
    )
    assert D.share > 0.5
    if not left:
        assert G.share == 1.0
        return
    assert 0.3 < G.share < 1 and reason in G.not_copied[left] and reason in str(G)
    assert torch.equal(state.G.state_dict()[left], before[left])


def test_transfer_source_without_fitting_weights_is_refused(whole: Bundle, tmp_path: Path) -> None:
    source = read_source(Path(whole.location))
    with pytest.raises(
        TrainingError, match="--from: .*none of its weights fit.*channel_max 16, .*channel_max 8, z_dim 8"
    ):
        transfer(source, new_state(_config(channel_max=8, z_dim=8, w_dim=8), CPU))
    with pytest.raises(BundleError):
        read_source(tmp_path)
    (tmp_path / "file.pkl").write_bytes(b"nonsense")
    with pytest.raises(BundleError):
        read_source(tmp_path / "file.pkl")


def test_card_names_source_bundle_and_resume_skips_transfer(whole: Bundle, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    dataset = ImageDataset(images, np.arange(8) % 2, ("benign", "malignant"), tuple(map(str, range(8))), "0" * 64)
    began: list[float] = []

    def begin(state: GanState) -> None:
        began.append(transfer(read_source(Path(whole.location)), state)[0].share)

    for kimg, resume in ((0.004, False), (0.008, True)):
        config = _config(total_kimg=kimg, learning_rate=1e-6, ema_rampup=None)
        write = write_snapshot(dataset, config, GeneratorOrigin("moles", "folder", "CC0-1.0", "nobody"), CPU)
        train(dataset, config, tmp_path, device=CPU, resume=resume, begin=begin, on_snapshot=write, progress_bar=False)
    assert began == [1.0]
    bundle = open_bundle(tmp_path / "bundle")
    assert f"whole (`{whole.digest[:16]}`): 100% of the generator, 100% of the discriminator" in bundle.model_card
    ours, theirs = (load_generator(b).get_parameter("synthesis.b16.conv1.weight") for b in (bundle, whole))
    assert (ours - theirs).abs().max() < 0.01
