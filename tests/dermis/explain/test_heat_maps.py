"""Tests of heat maps: they are complete, reproducible and highlight what the network uses; the page orders and resumes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle.classifier import NOTICE
from dermis.classifier.onnx_session import Classifier
from dermis.classifier.preprocess import to_input
from dermis.errors import DermisError
from dermis.explain import attribution
from dermis.explain.attribution import METHODS, Explainer, Method, attribute
from dermis.explain.rendering import colours, full_colour, heat_map, salient_mask, to_png
from dermis.imaging import Images, encode
from lesions import lesion
from tiny_skin import make_skin

SIZE = 48


class Quadrant(nn.Module):
    """A network that depends only on the red of the upper left quarter of an image. It is not linear, so that one step is not
    enough."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        half = images.shape[-1] // 2
        seen = images[:, 0, :half, :half] / 255 - images[:, 2, :half, :half] / 510
        return 20 * torch.tanh(2 * seen - 0.7).mean((1, 2)), images


def quarters(size: int = SIZE) -> Images:
    """Four quarters of different colours with a little noise, which segments do not cross."""
    rng = np.random.default_rng(1)
    image = rng.normal(0, 4, (size, size, 3))
    half = size // 2
    for (y, x), colour in zip(
        ((0, 0), (0, 1), (1, 0), (1, 1)), ((220, 60, 60), (60, 200, 80), (60, 80, 200), (200, 200, 60)), strict=True
    ):
        image[y * half : (y + 1) * half, x * half : (x + 1) * half] += colour
    return image.clip(0, 255).astype(np.uint8)


# -- numbers


@pytest.mark.parametrize("method", METHODS)
def test_attributions_sum_to_logit_minus_baseline(method: Method) -> None:
    network, image = Quadrant(), quarters()
    result = attribute(network, image, method)
    assert result.values.dtype == np.float32 and result.values.shape == (SIZE, SIZE)
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    expected = [float(network(each)[0]) for each in (x, torch.zeros_like(x), torch.full_like(x, 255))]
    assert result.logit == pytest.approx(expected[0])
    assert result.baseline == pytest.approx(np.mean(expected[1:]))
    assert result.values.sum() == pytest.approx(result.logit - result.baseline, abs=1e-3)
    assert abs(result.gap) < 1e-3 < abs(result.logit - result.baseline)
    assert abs(attribute(network, image, method, steps=1).gap) > 0.1  # so the tolerance is small in comparison


def test_attributions_lie_in_region_that_network_uses() -> None:
    half = SIZE // 2
    pixels = attribute(Quadrant(), quarters(), "integrated-gradients").values
    assert not pixels[half:].any() and not pixels[:, half:].any() and (pixels[:half, :half] > 0).all()
    regions = attribute(Quadrant(), quarters(), "xrai")
    mask = salient_mask(regions, 20)
    edge = half + 6  # segments are widened by 5 px
    assert mask[: half - 1, : half - 1].all() and mask.sum() == mask[:edge, :edge].sum()
    assert regions.values[:edge, :edge].sum() > 0.99 * regions.values.sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_same_image_gives_same_heat_map_bytes(timm_classifier: Path, method: Method) -> None:
    image = lesion(3, SIZE)
    first, second = (Explainer(timm_classifier).attribute(image, method) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes()
    assert to_png(heat_map(first, 100)) == to_png(heat_map(second, 100))
    with Classifier(timm_classifier, device="cpu") as session:
        assert first.logit == pytest.approx(float(session.classify([image]).logits[0]), abs=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (30, 71), (200, 90)])
def test_explainer_resizes_images_like_classifier(timm_classifier: Path, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    result = Explainer(timm_classifier).attribute(image)
    assert (result.image == to_input(image, SIZE)).all() and result.values.shape == (SIZE, SIZE)
    assert np.isfinite(result.values).all()


@pytest.mark.parametrize("value", [0, 128, 255])
def test_image_of_one_colour_has_uniform_attribution(timm_classifier: Path, value: int) -> None:
    result = Explainer(timm_classifier).attribute(np.full((SIZE, SIZE, 3), value, np.uint8))
    assert np.ptp(result.values) == 0 and np.isfinite(result.values).all()
    assert heat_map(result).shape == (SIZE, SIZE, 3)


def test_explainer_error_names_packages_to_install(monkeypatch: pytest.MonkeyPatch, timm_classifier: Path) -> None:
    find = attribution.importlib.util.find_spec
    monkeypatch.setattr(
        attribution.importlib.util, "find_spec", lambda name: None if name == "saliency" else find(name)
    )
    with pytest.raises(DermisError, match=r'saliency: pip install "captum>'):
        Explainer(timm_classifier)


def test_heat_map_modules_import_without_torch_and_saliency() -> None:
    program = (
        "import sys, dermis.explain.rendering, services.inference.heat_maps, services.gateway.heat_maps;"
        "sys.exit(bool({'torch', 'saliency', 'captum', 'skimage'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3]).returncode == 0


# -- pictures


def test_heat_map_lightness_grows_alike_for_both_signs() -> None:
    values = np.linspace(0, 1, 33)
    grey = np.array([0.2126, 0.7152, 0.0722])
    light = {sign: colours(sign * values) @ grey for sign in (-1, 1)}
    for steps in light.values():
        assert (np.diff(steps) > 0).all()
    assert np.abs(light[-1] - light[1]).max() < 0.1
    red, _, blue = colours(np.array([0.6]))[0]
    assert red > 2 * blue
    red, _, blue = colours(np.array([-0.6]))[0]
    assert blue > 2 * red


def test_heat_map_colours_show_sign_over_grey_image() -> None:
    result = attribute(Quadrant(), quarters(), "xrai")
    flipped = attribution.Attribution("xrai", result.image, -result.values, result.logit, result.baseline)
    for each, strong, weak in ((result, 0, 2), (flipped, 2, 0)):
        corner = heat_map(each)[5:15, 5:15].astype(float).mean((0, 1))
        assert corner[strong] > corner[weak] + 30
    assert full_colour(result) > 0
    nothing = attribution.Attribution("xrai", result.image, np.zeros_like(result.values), 0.0, 0.0)
    shown = heat_map(nothing).astype(int)
    assert (shown[..., 0] == shown[..., 2]).mean() > 0.9 and np.ptp(shown) > 30
    assert NOTICE.encode() in to_png(shown.astype(np.uint8))


# -- the page


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["explain", "heat-maps", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.full
def test_page_shows_mistakes_first_and_rerun_reuses_attributions(
    timm_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_skin(tmp_path / "skin", count=12)
    options = ("--data", str(tmp_path / "skin"), "--classifier", str(timm_classifier), "--out", str(tmp_path / "out"))
    output = run(*options, "--count", "7", "--pictures", "--device", "cpu")
    assert NOTICE in output
    page = (tmp_path / "out" / "index.html").read_text()
    assert NOTICE in page and "This page shows the images" in page and "7 of 12 images" in page
    figures = page.split("<figure>")[1:]
    assert len(figures) == 7 and all(figure.count("data:image/png;base64,") == 3 for figure in figures)
    text = re.sub(r"base64,[^\"]+", "", page)  # base64 of a picture can contain any letters
    assert "http:" not in text and "https:" not in text and "url(" not in text  # it needs nothing else
    wrong = ['class="wrong"' in figure for figure in figures]
    assert wrong == sorted(wrong, reverse=True) and any(wrong)
    distance = [abs(float(figure.split("calibrated\n")[1].split()[0]) - 0.5) for figure in figures]
    mistakes = sum(wrong)
    assert distance[:mistakes] == sorted(distance[:mistakes], reverse=True)
    assert distance[mistakes:] == sorted(distance[mistakes:])
    pictures = sorted((tmp_path / "out" / "heat-maps").iterdir())
    assert len(pictures) == 7 and pictures[0].name.startswith("0000-ISIC_")
    assert len(list((tmp_path / "out" / "attributions").iterdir())) == 7

    monkeypatch.setattr(Explainer, "attribute", lambda *_: pytest.fail("it was there already"))
    before = pictures[0].read_bytes()
    run(*options, "--count", "7", "--pictures", "--device", "cpu")
    assert (tmp_path / "out" / "index.html").read_text() == page and pictures[0].read_bytes() == before


def test_unreadable_image_is_reported_and_page_shows_the_others(timm_classifier: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / f"<b>{i}.png").write_bytes(encode(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)))
    (tmp_path / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    with pytest.raises(DermisError, match="1 images could not be read"):
        run(str(tmp_path), "--classifier", str(timm_classifier), "--out", str(out), "--method", "integrated-gradients")
    page = (out / "index.html").read_text()
    assert "3 of 3 images" in page and "<b>" not in page and "&lt;b&gt;0.png" in page
    assert "label" not in page.split(">Images</h2>")[1].split("<script>")[0]


def test_invalid_heat_map_page_options_are_refused(timm_classifier: Path, tmp_path: Path) -> None:
    make_skin(tmp_path / "skin", count=4)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    header, rows = "isic_id,part,label,logit,probability,calibrated\n", ["ISIC_0000000,test,1,9,0.999,0.99\n"]
    (tmp_path / "other.csv").write_text(header + rows[0])
    (tmp_path / "none.csv").write_text(header)
    skin, common = ("--data", str(tmp_path / "skin")), ("--classifier", str(timm_classifier))
    for arguments, message in (
        ((*skin, "--out", str(tmp_path / "used")), "thesis.txt; choose a new folder"),
        ((*skin, "--out", str(timm_classifier / "page")), "outside of the bundle"),
        (("--out", str(tmp_path / "o")), "give image files or folders, or --data"),
        ((*skin, "--predictions", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")), "no image of the part"),
        ((*skin, "--predictions", str(tmp_path / "other.csv"), "--out", str(tmp_path / "o")), "of this classifier"),
        ((*skin, "--predictions", str(tmp_path / "no.csv"), "--out", str(tmp_path / "o")), "No such file"),
    ):
        with pytest.raises(DermisError, match=message):
            run(*common, *arguments)
    assert not (timm_classifier / "page").exists() and not (tmp_path / "o" / "index.html").exists()
