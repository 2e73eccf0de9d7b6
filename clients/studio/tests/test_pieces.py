"""Tests of the pieces of the pages that need neither Gradio nor a service."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from html.parser import HTMLParser
from importlib.resources import files
from itertools import islice
from typing import Any

import gradio as gr
import pytest
from dermis_client import (
    APIConnectionError,
    DermisError,
    Embedding,
    EmbeddingMap,
    Model,
    Study,
    StudyResults,
)
from dermis_client.errors import RateLimitError, ServerError, UnprocessableEntityError
from dermis_client.models import Problem
from dermis_client.studies import NewInvitation, StudyImages
from dermis_studio import markup, scales, snippets, sources
from dermis_studio.app import _name_numbers, number_refused
from dermis_studio.pages import embedding_map, map_points, models, studies, study_view
from dermis_studio.samples import SampleRef, words_of
from dermis_studio.sources import SourceFields
from PIL import Image

EVIL = '<script>alert("x")</script>&'


def error(kind: type[Any], status: int, retry_after: float | None = None) -> Any:
    problem = Problem.model_validate(
        {"title": EVIL, "status": status, "detail": EVIL, "errors": [{"field": EVIL, "message": EVIL}]}
    )
    return kind(EVIL, problem=problem, status_code=status, request_id=EVIL, retry_after=retry_after)


def test_problem_shows_title_fields_and_what_to_do_and_escapes_all_of_them() -> None:
    shown = markup.problem(error(UnprocessableEntityError, 422))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 5
    assert 'role="alert"' in shown
    assert "Change the values" in shown
    assert "in 7 s" in markup.problem(error(RateLimitError, 429, 7.0))
    assert "Try again in 7 s, or ask for fewer images" in markup.problem(error(ServerError, 503, 7.0))
    assert "The service does not respond" in markup.problem(APIConnectionError("refused"))
    assert EVIL not in markup.problem(RuntimeError(EVIL))


def test_problem_of_a_page_itself_says_what_to_do() -> None:
    shown = markup.problem(DermisError("no image is chosen; choose one first"))
    assert "<p>no image is chosen</p>" in shown
    assert '<p class="ds-remedy">Choose one first.</p>' in shown
    assert '<p class="ds-remedy">Change' in markup.problem(DermisError("too large"))


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("internal", 500, "Tell the operator the id of the dataset: the log of the service has the reason."),
        ("storage-full", 507, "Delete what is not needed, and ask the operator to free space."),
        ("no-classifier", 422, "Change the values that are named here."),
        ("model-unavailable", 503, "Ask the operator whether the model is served again."),
    ],
)
def test_failed_job_shows_its_title_and_what_to_do_about_its_kind(kind: str, status: int, words: str) -> None:
    found = Problem.model_validate(
        {
            "type": f"urn:dermis:problem:{kind}",
            "title": "The <title>",
            "status": status,
            "detail": EVIL,
            "errors": [{"field": "privacy.gate", "message": "too strict"}],
        }
    )
    shown = markup.failure(found, "dataset", "create the dataset")
    assert "<h2>The &lt;title&gt;</h2>" in shown and "<script" not in shown
    assert "<code>privacy.gate</code> too strict" in shown
    assert f'<p class="ds-remedy">{words} Then create the dataset again.</p>' in shown
    assert "The service gave no reason" in markup.failure(None, "dataset", "create the dataset")


@pytest.mark.parametrize(
    ("message", "detail", "remedy"),
    [
        ("the folder is empty; put images into it", "the folder is empty", "Put images into it."),
        ("internal error; see the log", "internal error", "Tell the operator the id of the study"),
        ("no space", "no space", "Correct what is named here."),
    ],
)
def test_failed_study_shows_what_to_do(message: str, detail: str, remedy: str) -> None:
    shown = study_view.described(studied(state="failed", error=message))
    assert "<h2>The images of the study cannot be made</h2>" in shown and f"<p>{detail}</p>" in shown
    assert f'class="ds-remedy">{remedy}' in shown and "Then create the study again." in shown


def test_upload_that_ended_shows_the_title_of_the_problem_and_what_to_do() -> None:
    ended = {"done": 1, "total": 3, "problem": "a quota", "title": "A quota of the tenant is used up", "status": 429}
    shown = studies._upload_problem(ended | {"wait": 40000})
    assert "<h2>A quota of the tenant is used up</h2>" in shown
    assert "Try again in 11.1 h" in shown and "1 of 3 images are uploaded" in shown
    late = studies._upload_problem({"done": 0, "total": 3, "problem": "a.png did not arrive in time"})
    assert "<h2>Not all images were uploaded</h2>" in late and "Choose the files again." in late
    assert "without those that are named" in studies._upload_problem(ended | {"status": 422})


@pytest.mark.parametrize(
    ("least", "greatest", "words"), [(0, None, "Enter 0 or more."), (0.5, 4, "Enter 0.5 to 4."), (None, 3, "at most 3")]
)
def test_refused_number_says_which_are_allowed(least: Any, greatest: Any, words: str) -> None:
    refused = number_refused("<b>Seed", -3.0, least, greatest)
    assert refused.message.startswith("&lt;b&gt;Seed: -3 is not allowed.") and words in refused.message
    assert refused.title == "This number is not allowed"


def test_numbers_and_sliders_name_their_field() -> None:
    _name_numbers()
    for kind in (gr.Number, gr.Slider):
        with pytest.raises(gr.Error, match="Strength: 9 is not allowed. Enter 1 to 5."):
            kind(label="Strength", minimum=1, maximum=5, value=2).preprocess(9)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_large_images_are_reduced_before_they_are_copied(mode: str) -> None:
    """The left half of an image, whose size does not divide by the factor, is the upper one of the turned image."""
    colour: dict[str, Any] = {
        "RGB": (32, 64, 192),
        "RGBA": (32, 64, 192, 255),
        "P": 1,
        "LA": (90, 255),
        "I;16": 90 << 8,
    }
    shown = {"RGB": (32, 64, 192), "RGBA": (32, 64, 192), "P": (32, 64, 192), "1": (255, 255, 255)}
    image = Image.new(mode, (2405, 1603))
    if mode == "P":
        image.putpalette([0, 0, 0] + [32, 64, 192] * 255)
    image.paste(
        Image.new(mode, (1203, 1603), colour.get(mode, 90)) if mode == "I;16" else colour.get(mode, 90),
        (0, 0, 1203, 1603),
    )
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    small, size = sources._decoded(encoded(image, "PNG", exif=exif, compress_level=1))
    assert (small.mode, size) == ("RGB", (1603, 2405))
    assert (small.width, small.height) == (802, 1203)
    assert small.getpixel((400, 5)) == shown.get(mode, (90, 90, 90))
    assert small.getpixel((400, 1198)) == (0, 0, 0)


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "KEPT_PIXELS", 1000)
    content = encoded(Image.new("RGB", (60, 60)), "PNG")
    small = encoded(Image.new("RGB", (20, 20)), "PNG")
    with sources._turn(2000), ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(sources.opened, content) for _ in range(sources.MAX_WAITING + 2)]
        refused = list(islice(as_completed(waiting), 2))
        assert all("try again" in str(each.exception()) for each in refused)
        assert sources.opened(small).size == (20, 20)  # does not wait
        assert sum(each.done() for each in waiting) == 2
        sources._decoding.release()
        try:
            assert sum(each.exception() is None for each in waiting) == sources.MAX_WAITING
        finally:
            sources._decoding.acquire()


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_too_many_pixels_of_a_webp_are_found_in_its_header(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(Image.new("RGB", (50, 41)), "WEBP", **options)
    assert sources._webp_pixels(content) == 50 * 41
    monkeypatch.setattr(sources, "MAX_PIXELS", 50 * 41 - 1)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="more than 2,049 pixels"):
        sources.opened(content)


def test_loading_a_page_keeps_what_was_entered_meanwhile() -> None:
    model = Model.model_construct(name="demo", classes=["benign"])
    with gr.Blocks():
        fields = SourceFields()
    kept = dict(zip(fields.outputs, fields.updates(model, {}), strict=True))
    assert "value" not in kept[fields.kind]
    named = dict(zip(fields.outputs, fields.updates(model, {"class_name": "benign", "seed": "7"}), strict=True))
    assert "value" not in named[fields.kind] and named[fields.class_name]["value"] == "benign"
    assert fields.seed not in named and fields.index not in named  # the browser fills them when the page is loaded
    only_files = dict(zip(fields.outputs, fields.updates(model, {}, samples=False), strict=True))
    assert only_files[fields.kind]["value"] == "file"


@pytest.mark.parametrize("value", [EVIL, "'\"`${1+1}{{x}}", "é\n"])
def test_texts_from_outside_are_escaped(value: str) -> None:
    parts = [
        markup.facts([(value, "1")]),
        markup.empty_state(value, value),
        markup.progress(value, 0.5),
        markup.code_block(value, value),
        markup.success(value),
        scales.probability_scale(0.5, value, {value: 0.3}, value),
    ]
    assert all("<script" not in part for part in parts)
    attribute = f'<b data-x="{markup.attribute({"a": value})}">'
    assert attribute.count('"') == 2


def test_numbers_sizes_and_durations_are_in_words() -> None:
    assert [markup.number(value) for value in (1234567, 0.1234567, 12.5)] == ["1,234,567", "0.123", "12.5"]
    assert [markup.size(count) for count in (999, 31_000, 2_400_000, 5e9)] == ["999 B", "31.0 kB", "2.4 MB", "5.0 GB"]
    assert [markup.duration(seconds) for seconds in (0.2, 42, 600, 9000)] == ["1 s", "42 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 image is"),
        (0, "0 images are"),
        (2, "2 images are"),
        (12_000, "12,000 images are"),
        (1.0004, "1 image is"),
    ],
)
def test_what_is_counted_has_the_form_of_its_number(count: float, words: str) -> None:
    assert markup.counted(count, "image is", "images are") == words


def test_words_of_a_study_with_a_single_real_image() -> None:
    shown = study_view.described(studied(state="collecting", images=2, classes={"nevus": {"uploaded": 0}}))
    assert "1 real image is needed; 0 are uploaded. Upload 1 more." in shown
    assert studies._uploaded(1) == "1 image is uploaded"


def test_snippets_are_programs_with_the_same_request() -> None:
    body = {"classes": {"it's": 2}, "seed": 3, "privacy": {"gate": "authentic"}}
    command = snippets.curl("http://127.0.0.1:3000", "/v1/images", body, with_key=True)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["curl", "-sS", "http://127.0.0.1:3000/v1/images"]
    assert json.loads(words[-1]) == body
    assert "$DERMIS_API_KEY" in command
    program = snippets.python("http://127.0.0.1:3000", "images.generate", body, "result.save('x')")
    calls: list[dict[str, Any]] = []

    class Images:
        def generate(self, **given: Any) -> Any:
            calls.append(given)
            return self

        def save(self, _folder: str) -> None:
            pass

    class Client:
        images = Images()

        def __init__(self, _url: str) -> None:
            pass

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    exec(program.replace("from dermis_client import DermisClient", ""), {"DermisClient": Client})
    assert calls == [body]


@pytest.mark.parametrize("number", [0, 0.0, "0"])
def test_truncation_of_0_is_not_the_default(number: Any) -> None:
    """The messages of a page have numbers, its address has texts."""
    named = {"class_name": "a", "seed": 3, "index": 5}
    sample = SampleRef.parse({**named, "truncation": number})
    assert sample is not None and sample.truncation == 0.0
    assert sample.body["truncation_psi"] == 0.0
    for missing in ({}, {"truncation": None}, {"truncation": ""}):
        default = SampleRef.parse({**named, **missing})
        assert default is not None and default.truncation == 1.0


def test_sample_survives_its_address_and_bad_addresses_are_refused() -> None:
    from urllib.parse import parse_qsl

    sample = SampleRef("demo", "a & b", 7, 12, 0.5, "const")
    assert SampleRef.parse(dict(parse_qsl(sample.query))) == sample
    assert sample.body == {
        "classes": {"a & b": 1}, "seed": 7, "start_index": 12, "model": "demo", "truncation_psi": 0.5, "noise_mode": "const"
    }  # fmt: skip
    assert SampleRef.parse({}) is None
    with pytest.raises(ValueError, match="whole seed"):
        SampleRef.parse({"class_name": "a", "seed": "x"})


@pytest.mark.parametrize(
    ("authentic", "percentile", "copy", "title"),
    [
        (True, 60, False, "Not near"),
        (False, 60, None, "Near to"),
        (True, 0, None, "Very near"),
        (True, 60, True, "changed copy"),
    ],
)
def test_verdicts_are_in_words(authentic: bool, percentile: int, copy: bool | None, title: str) -> None:
    assert title in words_of(authentic, percentile, copy)[0]


def test_bars_of_the_distance_scale_have_the_area_of_their_share() -> None:
    shown = scales.distance_scale(0.3, {"0": 0.1, "50": 0.2, "100": 0.4})

    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', shown)
    areas = [float(width) * float(height) for _, width, height in bars]
    assert len(areas) == 2
    assert areas[0] == pytest.approx(areas[1], rel=0.02)  # half of the distances each
    assert scales.distance_scale(0.3, {}) == ""


NOW = "2026-11-29T00:00:00Z"


def studied(**fields: Any) -> Study:
    """An open study of four images."""
    return Study.model_validate(
        {
            "id": f"st_{'0' * 32}",
            "name": "Pilot",
            "state": "open",
            "images": 4,
            "seed": 1,
            "model": {"name": "demo", "digest": "d" * 64},
            "created_at": NOW,
            "expires_at": "2027-05-28T00:00:00Z",
        }
        | fields
    )


def test_study_is_described_without_markup_from_outside() -> None:
    study = studied(name="<b>Pilot", seed=987654321987)
    rate = {"count": 3, "total": 4, "share": 0.75, "low": 0.3, "high": 0.95}
    rates = dict.fromkeys(("accuracy", "sensitivity", "specificity", "called_generated"), rate)
    reader = {"invitation": "a", "label": "<i>R", "answered": 4, "rates": rates, "d_prime": 1, "criterion": 0}
    results = StudyResults.model_validate(
        {"answers": 4, "rates": rates, "p_value": 0.5, "readers": [reader | {"median_seconds": 2.0}]}
    )
    shown = study_view.described(study, [], results)
    assert "<b>Pilot" not in shown and "&lt;b&gt;Pilot" in shown and "<i>R" not in shown
    assert "75 %" in shown and "[30, 95]" in shown and "987654321987" not in shown
    collecting = study.model_copy(update={"state": "collecting", "classes": {"nevus": StudyImages(uploaded=1)}})
    waiting = study_view.described(collecting)
    assert "Upload 1 more" in waiting and 'data-act="open"' in waiting and " disabled>Choose the images" in waiting


def test_form_of_a_study_stays_in_its_place_while_the_page_is_shown_again() -> None:
    """Gradio compares what it shows with what was there place by place, and replaces an element that is another one."""
    study = studied(state="preparing")
    invitation = {"id": "a", "label": "R", "state": "active", "answered": 0, "created_at": NOW, "expires_at": NOW}
    made = NewInvitation.model_validate(invitation | {"token": "t", "path": "/read#t", "url": "http://host/read#t"})
    opened = study.model_copy(update={"state": "open"})
    shown = [
        study_view.described(study),
        study_view.described(opened),
        study_view.described(opened, [made], None, made, markup.success("Done")),
    ]
    assert {place_of(each, "form") for each in shown} == {(0, 3, 2)}
    assert [each.count('data-made="a"') for each in shown] == [0, 0, 1]


def place_of(content: str, name: str) -> tuple[int, ...]:
    """The places of an element and of those around it among the elements beside them, from outside."""
    places: list[tuple[int, ...]] = []
    counts: list[int] = [0]
    path: list[int] = []

    class Places(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            if tag == name:
                places.append((*path, counts[-1]))
            if tag not in {"input", "img", "br"}:
                path.append(counts[-1])
                counts[-1] += 1
                counts.append(0)
            else:
                counts[-1] += 1

        def handle_endtag(self, tag: str) -> None:
            path.pop()
            counts.pop()

    Places().feed(content)
    assert len(places) == 1
    return places[0]


def known_map(**training: Any) -> EmbeddingMap:
    counted: dict[str, Any] = {
        "counted": 4543,
        "side": 0.25,
        "smallest": 20,
        "cubes": [{"centre": [0, 0, 0], "images": 120}],
    }
    model = {"name": "demo", "digest": "0" * 64, "index": "1" * 64}
    return EmbeddingMap.model_validate(
        {"model": model, "extractor": "e", "metric": "cosine", "explained": [0.5, 0.2], "training": counted | training}
    )


def test_map_sends_points_as_an_attribute_and_says_how_training_images_are_shown() -> None:
    verdict = {"index": 0, "authentic": False, "distance": 0.5, "percentile": 30}
    embedding = Embedding.model_validate({"index": 0, "position": [0.12345, 2, 3, 4], "verdict": verdict})
    picture = map_points.thumbnail(Image.new("RGB", (300, 150), "red"))
    points = [
        map_points.Point(EVIL, map_points.GENERATED, EVIL, embedding, picture, "seed=1", [("explore", "Explore")]),
        map_points.Point("own", map_points.OWN, map_points.NOT_KNOWN, embedding.model_copy(update={"verdict": None})),
    ]
    shown = map_points.element(known_map(), points, 1)
    assert "<script" not in shown and "at least 20 training images" in shown and "about 120 of 4,543" in shown
    sent = json.loads(html.unescape(shown.partition('data-map="')[2].partition('"')[0]))
    assert sent["points"][0]["at"] == [0.1235, 2.0, 3.0, 4.0] and sent["points"][0]["verdict"].startswith("Near to")
    assert sent["points"][1]["verdict"] == map_points.NOT_COMPARED and not sent["points"][1]["picture"]
    assert (sent["cubes"], sent["chosen"], sent["positions"]) == ([[0, 0, 0, 120]], 1, [])
    assert sent["sheet"].startswith("data:image/jpeg;base64,")
    assert "not shown" in map_points.training_words(known_map(cubes=[]))
    assert "Do not pass this page on" in map_points.training_words(known_map(positions=[[0, 0, 0]]))


def test_thumbnails_are_in_the_order_of_the_points() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    pictures = [None, *(map_points.thumbnail(Image.new("RGB", (64, 64), colour)) for colour in colours)]
    sheet = map_points._sheet([*pictures, *[None] * 20, pictures[1]])
    assert sheet is not None
    image = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    side = map_points.THUMBNAIL_PIXELS
    assert image.size == (20 * side, 2 * side)
    for column, row, channel in ((1, 0, 0), (2, 0, 1), (3, 0, 2), (4, 1, 0)):
        pixel = image.getpixel((int((column + 0.5) * side), int((row + 0.5) * side)))
        assert isinstance(pixel, tuple) and pixel[channel] > 200 and sum(pixel) < 400, (column, row)


def test_chart_of_distances_ends_at_the_last_step() -> None:
    chart = scales.distance_chart([(1, 4.0), (50, 2.0), (100, 1.0)], 200)
    points = chart.partition('points="')[2].partition('"')[0].split()
    assert points == ["41.6,8.0", "120.0,48.0", "200.0,68.0"]  # 40 to 360 px for 200 steps, 8 to 88 px for 4 to 0
    assert "Distance after 100 of 200 steps: 1.000; at the beginning 4.000." in chart
    assert scales.distance_chart([], 200) == ""


def test_model_shows_its_provenance_and_which_numbers_have_no_interval() -> None:
    change = {"kimg": 41.2, "before": {"learning_rate": 0.0025}, "after": {"learning_rate": 0.001}}
    dataset = {"name": EVIL, "images": 4543, "classes": {"benign": 3969}, "sha256": "9" * 64}
    model = Model.model_validate(
        {
            "name": "demo",
            "digest": "d" * 64,
            "provenance": {
                "code_version": "0.1.0",
                "dataset": dataset,
                "training": {"changes": [change], "hours": 2.8, "hardware": "a processor, 1 threads"},
            },
            "metrics": {
                "spaces": {
                    "lite0": {
                        "comparisons": {"generated_holdout": {"fd": 23.3, "fd_interval": [21.9, 25.1], "recall": 0.445}}
                    }
                }
            },
        }
    )
    shown = models.summary(model)
    assert "<script" not in shown and "4,543 images: 3,969 benign" in shown and f'title="{"9" * 64}"' in shown
    assert "dermis 0.1.0" in shown and "a processor, 1 thread, 2.8 hours" in shown
    numbers = models.measured(model)
    assert "Changes during the training (1)" in numbers and "<td>0.0025</td><td>0.001</td>" in numbers
    assert "<td>23.3 [21.9, 25.1]</td>" in numbers
    assert f"<td>0.445 {models._NO_INTERVAL}</td>" in numbers
    assert "not stated" in models.summary(model.model_copy(update={"provenance": None}))


ID = "pr_" + "0" * 32
OTHER_ID = "pr_" + "1" * 32


def in_browser(script: str, kept: str = "[]") -> Any:
    """Run an expression after `projections.js`, with Node.js in the place of a browser of the tenant ward-3."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    own = files("dermis_studio").joinpath("assets", "projections.js").read_text()
    program = f"""
    let kept = {kept!r}, tenant = 'ward-3';
    globalThis.window = globalThis;
    globalThis.localStorage = {{ getItem: () => kept, setItem: (name, text) => {{ kept = text; }} }};
    globalThis.document = {{ querySelector: () => ({{ textContent: tenant }}) }};
    {own}
    console.log(JSON.stringify({script}));"""
    return json.loads(subprocess.run([node, "-e", program], capture_output=True, text=True, check=True).stdout)


def test_projections_of_this_browser_are_kept_until_they_expire_or_are_deleted() -> None:
    script = f"""(() => {{
      const own = dermisProjections, ids = () => own.list().map(({{ id }}) => id);
      own.remember('{ID}', '2026-11-29T10:00:00Z', '2999-01-01T00:00:00Z');
      own.remember('{OTHER_ID}', '2026-11-29T11:00:00Z', '2999-01-01T00:00:00Z');
      own.remember('{ID}', '2026-11-29T10:00:00Z', '2999-01-01T00:00:00Z');
      const both = ids();
      own.remember('pr_{"2" * 32}', '2020-01-01T00:00:00Z', '2020-01-02T00:00:00Z');
      const unexpired = ids();
      tenant = 'ward-4';
      const others = ids();
      tenant = 'ward-3';
      own.forget('{OTHER_ID}');
      return [both, unexpired, others, ids()];
    }})()"""
    both = [OTHER_ID, ID]
    assert in_browser(script) == [both, both, [], [ID]]
    for broken in ("nothing", '{"a": 1}', '[{"id": "<b>", "until": 1e15}]'):
        assert in_browser("dermisProjections.list()", broken) == []


def test_chosen_projection_is_added_to_those_that_are_named() -> None:
    def chosen(value: Any) -> gr.EventData:
        return gr.EventData(None, value)

    assert embedding_map.with_projection(chosen({"id": ID}), f" {OTHER_ID},") == f"{OTHER_ID} {ID}"
    assert embedding_map.with_projection(chosen({"id": ID}), ID) == ID
    for bad in ({"id": "<b>"}, {}, None):
        assert embedding_map.with_projection(chosen(bad), None) == ""


def test_link_to_a_file_does_not_leave_the_page() -> None:
    """Gradio closes the connection of a page that the browser begins to leave, also if a file is saved instead."""
    link = markup.file_link("files/a.zip", "a.zip", kind="ds-button")
    assert link == '<a class="ds-button" href="files/a.zip" target="_blank" rel="noopener">a.zip</a>'
