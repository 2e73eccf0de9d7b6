"""The command line `dermis-client`. Results are on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dermis_client import _cli_text as text
from dermis_client import folders, params
from dermis_client._client import DermisClient
from dermis_client._files import write_atomically
from dermis_client._untrusted import one_line, printable, printable_json
from dermis_client._version import __version__
from dermis_client.errors import DermisError, InvalidRequestError
from dermis_client.models import DatasetFormat, DatasetState, HeatMapMethod, ImageFormat, NoiseMode
from dermis_client.resources.dataset_records import Dataset

MAX_LINE_LENGTH = 10_000  # maximum number of characters of a printed line
app = typer.Typer(
    name="dermis-client",
    help="Generate and download synthetic dermoscopy with a dermis service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
datasets = typer.Typer(help="Create, watch, download and delete datasets.", no_args_is_help=True)
app.add_typer(datasets, name="datasets")

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", envvar="DERMIS_BASE_URL", help="Address of the service; default http://127.0.0.1:3000."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="DERMIS_API_KEY",
        show_default=False,
        help="API key of the service. Other users of the machine can see arguments of commands: prefer the variable.",
    ),
]
PlainHttp = Annotated[
    bool | None,
    typer.Option(
        "--allow-plain-http",
        envvar="DERMIS_ALLOW_PLAIN_HTTP",
        show_default=False,
        help="Send the API key also over http:// to another machine.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the dataset, ds_...", show_default=False)]
Classes = Annotated[
    str, typer.Option("--classes", help="Number of images of each class: malignant=500,benign=500.", show_default=False)
]
Seed = Annotated[int, typer.Option("--seed", help="0 to 2^63 - 1; the same request gives the same images.")]
Model = Annotated[str | None, typer.Option("--model", help="Name of the model; default: the service's.")]
FileFormat = Annotated[ImageFormat | None, typer.Option("--image-format", help="Default: png.")]
Quality = Annotated[int | None, typer.Option("--image-quality", help="1 to 100, for jpeg and webp.")]
Psi = Annotated[
    float | None, typer.Option("--truncation-psi", help="0 to 2; lower values give more typical, less varied images.")
]
Cutoff = Annotated[int | None, typer.Option("--truncation-cutoff", help="Number of layers that truncation applies to.")]
Noise = Annotated[
    NoiseMode | None,
    typer.Option(
        "--noise-mode", help="random (default): each image has its own noise; const: all have the same; none."
    ),
]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Stop waiting after this number of seconds.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to download into.", show_default=False)]
Extract = Annotated[bool, typer.Option("--extract", help="Also unpack images.zip into OUT/images.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of another dataset in the folder.")]
Parallel = Annotated[int, typer.Option("--parallel", help="Files to fetch at the same time.")]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    allow_plain_http: PlainHttp = None,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate and download synthetic dermoscopy with a dermis service."""
    context.obj = (base_url, as_json, api_key, allow_plain_http)


def _client(context: typer.Context, base_url: str | None) -> DermisClient:
    """Create a client. --base-url may be before or after the name of the command; the later one is used."""
    explicit = context.get_parameter_source("base_url")
    own_option = base_url if explicit is not None and explicit.name == "COMMANDLINE" else None
    address, _, api_key, allow_plain_http = context.obj
    return DermisClient(own_option or address or base_url, api_key=api_key, allow_plain_http=allow_plain_http)


def _print(context: typer.Context, as_json: bool, value: Any, lines: Callable[[], Iterable[str]]) -> None:
    """Print a result as one JSON document or as lines of text. Terminal control characters are escaped."""
    if as_json or context.obj[1]:
        typer.echo(printable_json(value))
        return
    for line in lines():
        typer.echo("\n".join(printable(part[:MAX_LINE_LENGTH]) for part in line.split("\n")))


def _note(message: str) -> None:
    """Print a line on stderr."""
    typer.echo(one_line(message, limit=2000), err=True)


def _fetch(dataset: Dataset, out: Path, extract: bool, overwrite: bool, parallel: int) -> dict[str, Any]:
    with text.interrupt_message(
        f"download interrupted; resume with: dermis-client datasets download {dataset.id} --out {out}"
    ):
        result = dataset.download(out, parallel=parallel, overwrite=overwrite, progress=True)
        output: dict[str, Any] = {"folder": str(result.folder), "files": [path.name for path in result.files]}
        output["images_count"] = result.images
        if extract:
            output["images"] = str(folders.extract_images(result.folder))
        return output


@app.command()
def models(context: typer.Context, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """List the models that the service offers."""
    with _client(context, base_url) as client:
        served = client.models.list()
    _print(context, as_json, [model.model_dump(mode="json") for model in served], lambda: text.format_models(served))


@app.command()
def usage(context: typer.Context, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """Show the quotas of your tenant and their use."""
    with _client(context, base_url) as client:
        used = client.usage.retrieve()
    _print(context, as_json, used.model_dump(mode="json"), lambda: text.format_usage(used))


@datasets.command()
def create(
    context: typer.Context,
    classes: Classes,
    seed: Seed = 0,
    model: Model = None,
    format: Annotated[  # noqa: A002  the name of the option
        DatasetFormat | None, typer.Option("--format", help="Default: imagefolder.")
    ] = None,
    image_format: FileFormat = None,
    image_quality: Quality = None,
    truncation_psi: Psi = None,
    truncation_cutoff: Cutoff = None,
    noise_mode: Noise = None,
    shard_size: Annotated[int | None, typer.Option("--shard-size", help="Samples in a shard.")] = None,
    keep: Annotated[
        params.ClassifierKeep | None,
        typer.Option("--keep", help="all, or agreeing: images that the model's classifier agrees with."),
    ] = None,
    threshold: Annotated[str | None, typer.Option("--threshold", help="Name of a threshold of the classifier.")] = None,
    min_probability: Annotated[
        float | None, typer.Option("--min-probability", help="Lowest probability of images to keep.")
    ] = None,
    max_probability: Annotated[
        float | None, typer.Option("--max-probability", help="Highest probability of images to keep.")
    ] = None,
    tries: Annotated[
        int | None, typer.Option("--tries", help="Latents to try for each image until one is kept.")
    ] = None,
    score: Annotated[
        bool | None, typer.Option("--score/--no-score", help="Add the classifier's probability as a column.")
    ] = None,
    edit: text.EditOption = None,
    gate: Annotated[
        params.GateCondition | None,
        typer.Option("--gate", help="Compare with the training images: authentic or min_distance."),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="Percentile for --gate min_distance; default 1.")
    ] = None,
    on_reject: Annotated[
        params.OnReject | None,
        typer.Option("--on-reject", help="Action for images that fail: resample (default), drop or flag."),
    ] = None,
    gate_tries: Annotated[
        int | None,
        typer.Option("--gate-tries", help="Images that the gate may reject before a sample is left out."),
    ] = None,
    detect_copies: Annotated[
        bool | None,
        typer.Option(
            "--detect-copies/--no-detect-copies", help="Also reject changed copies of training images; default: yes."
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option("--idempotency-key", help="A repeated request with the same key creates no second dataset."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the dataset has finished.")] = False,
    timeout: Timeout = None,
    out: Annotated[Path | None, typer.Option("--out", help="Wait, then download into this folder.")] = None,
    extract: Extract = False,
    overwrite: Overwrite = False,
    parallel: Parallel = 4,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Create a dataset; with --wait or --out, wait until it has finished."""
    if extract and out is None:
        raise InvalidRequestError("--extract: needs --out, the folder to download into")
    classifier = text.given(
        score=score,
        keep=keep,
        threshold=threshold,
        min_probability=min_probability,
        max_probability=max_probability,
        tries=tries,
    )
    privacy = text.given(
        gate=gate, percentile=percentile, on_reject=on_reject, tries=gate_tries, detect_copies=detect_copies
    )
    with _client(context, base_url) as client:
        with text.interrupt_message(
            "interrupted; the dataset may have been created already, see: dermis-client datasets list"
        ):
            dataset = client.datasets.create(
                text.parse_classes(classes),
                seed=seed,
                model=model,
                format=format,
                image_format=image_format,
                image_quality=image_quality,
                truncation_psi=truncation_psi,
                truncation_cutoff=truncation_cutoff,
                noise_mode=noise_mode,
                shard_size=shard_size,
                classifier=cast(params.ClassifierParams, classifier) or None,
                edits=text.parse_edits(edit),
                privacy=cast(params.PrivacyParams, privacy) or None,
                idempotency_key=idempotency_key,
            )
        if wait or out is not None:
            _note(dataset.id)
            with text.interrupt_message(
                f"interrupted; {dataset.id} continues, wait for it with: dermis-client datasets wait {dataset.id}"
            ):
                dataset = dataset.wait(progress=True, timeout=timeout)
        output = dataset.model_dump(mode="json")
        if out is not None:
            output["download"] = _fetch(dataset, out, extract, overwrite, parallel)
    _print(context, as_json, output, lambda: text.format_created_dataset(dataset, output.get("download")))


@datasets.command("list")
def list_datasets(
    context: typer.Context,
    state: Annotated[DatasetState | None, typer.Option("--state", help="Only datasets in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Maximum number of datasets.")] = 20,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """List datasets, newest first."""
    with _client(context, base_url) as client:
        records = list(client.datasets.list(state=state, limit=limit))
    _print(
        context, as_json, [record.model_dump(mode="json") for record in records], lambda: text.format_datasets(records)
    )


@datasets.command()
def show(context: typer.Context, dataset_id: Id, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """Show a dataset: its state, progress and request."""
    with _client(context, base_url) as client:
        dataset = client.datasets.retrieve(dataset_id)
    _print(context, as_json, dataset.model_dump(mode="json"), lambda: text.format_dataset(dataset))


@datasets.command("wait")
def wait_for(
    context: typer.Context, dataset_id: Id, timeout: Timeout = None, base_url: BaseUrl = None, as_json: Json = False
) -> None:
    """Wait until a dataset has finished."""
    with (
        _client(context, base_url) as client,
        text.interrupt_message(
            f"interrupted; {dataset_id} continues, wait for it with: dermis-client datasets wait {dataset_id}"
        ),
    ):
        dataset = client.datasets.wait(dataset_id, progress=True, timeout=timeout)
    _print(context, as_json, dataset.model_dump(mode="json"), lambda: text.format_created_dataset(dataset, None))


@datasets.command()
def download(
    context: typer.Context,
    dataset_id: Id,
    out: Out,
    extract: Extract = False,
    overwrite: Overwrite = False,
    parallel: Parallel = 4,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Download the files of a dataset, resume an interrupted download, and verify every hash."""
    with _client(context, base_url) as client:
        dataset = client.datasets.retrieve(dataset_id)
        output = _fetch(dataset, out, extract, overwrite, parallel)
    _print(context, as_json, output, lambda: text.format_download(output))


@datasets.command()
def report(context: typer.Context, dataset_id: Id, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """Show the report of a dataset: the scorecard, and what was not measured."""
    with _client(context, base_url) as client:
        made = client.datasets.report(dataset_id)
    _print(context, as_json, made.model_dump(mode="json"), lambda: text.format_report(made))


@datasets.command()
def cancel(context: typer.Context, dataset_id: Id, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """Stop a queued or running dataset."""
    with _client(context, base_url) as client:
        dataset = client.datasets.cancel(dataset_id)
    _print(context, as_json, dataset.model_dump(mode="json"), lambda: [f"{dataset.id} {dataset.state}"])


@datasets.command()
def delete(context: typer.Context, dataset_id: Id, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """Delete a dataset and its files from the service; a running one is stopped first."""
    with _client(context, base_url) as client:
        client.datasets.delete(dataset_id)
    _print(context, as_json, {"id": dataset_id, "deleted": True}, lambda: [f"{dataset_id} deleted"])


@app.command()
def images(
    context: typer.Context,
    classes: Classes,
    seed: Seed = 0,
    start_index: Annotated[int | None, typer.Option("--start-index", help="Index of the first image.")] = None,
    model: Model = None,
    image_format: FileFormat = None,
    image_quality: Quality = None,
    truncation_psi: Psi = None,
    truncation_cutoff: Cutoff = None,
    noise_mode: Noise = None,
    edit: text.EditOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every image into this folder.")] = None,
    grid: Annotated[Path | None, typer.Option("--grid", help="Write one contact sheet: grid.png.")] = None,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Generate a few images."""
    if out is None and grid is None:
        raise InvalidRequestError("give --out FOLDER for the images, --grid FILE.png for a contact sheet, or both")
    if grid is not None:
        text.format_of(grid)  # refuse a wrong suffix before any request is sent
    with _client(context, base_url) as client:
        result = client.images.generate(
            text.parse_classes(classes),
            seed=seed,
            start_index=start_index,
            model=model,
            image_format=image_format,
            image_quality=image_quality,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            edits=text.parse_edits(edit),
        )
    written = result.save(out) if out is not None else []
    if grid is not None:
        write_atomically(grid, text.encode(result.grid(), grid))
        written.append(grid)
    output = {
        "model": result.model.model_dump(mode="json"),
        "images": [image.model_dump(mode="json", by_alias=True, exclude={"content"}) for image in result],
        "files": [str(path) for path in written],
    }
    _print(context, as_json, output, lambda: map(str, written))


@app.command()
def classify(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG or WebP.", show_default=False)],
    model: Model = None,
    threshold: Annotated[
        str | None,
        typer.Option("--threshold", help="Name of a threshold, or a number 0 to 1; default: the classifier's own."),
    ] = None,
    heat_maps: Annotated[
        Path | None, typer.Option("--heat-maps", help="Also write a heat map of every image into this folder.")
    ] = None,
    method: Annotated[HeatMapMethod, typer.Option("--method", help="Method for --heat-maps.")] = "xrai",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Classify images with the classifier of a model."""
    with _client(context, base_url) as client:
        result = client.classifications.create(
            files,
            model=model,
            threshold=text.parse_threshold(threshold),
            heat_map=method if heat_maps else None,
            progress=True,
        )
    written = result.save_heat_maps(heat_maps) if heat_maps else []
    lines = text.format_classifications_csv if as_csv else text.format_classifications
    output = result.model_dump(mode="json", by_alias=True, exclude={"data": {"__all__": {"heat_map": {"content"}}}})
    if heat_maps:
        output["files"] = [str(path) for path in written]
    _print(context, as_json, output, lambda: lines(result))
    if written:
        _note(f"{len(written)} heat maps in {heat_maps}")
    _note(result.notice)


@app.command()
def authenticity(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Images: PNG, JPEG or WebP, if the service compares uploads.", show_default=False),
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Compare generated images instead of files: malignant=2,benign=2.")
    ] = None,
    seed: Seed = 0,
    model: Model = None,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Compare images with the training images of a model.

    A service compares files only if its operator has enabled that; generated images are always compared.
    """
    if bool(files) == bool(classes):
        raise InvalidRequestError("give image files, or --classes CLASS=COUNT for images that the service generates")
    with _client(context, base_url) as client:
        if classes:
            result = client.authenticity.check_generated(text.parse_classes(classes), seed=seed, model=model)
        else:
            result = client.authenticity.check(files or [], model=model, progress=True)
    _print(context, as_json, result.model_dump(mode="json"), lambda: text.format_verdicts(result))


@app.command()
def directions(context: typer.Context, model: Model = None, base_url: BaseUrl = None, as_json: Json = False) -> None:
    """List the directions along which images of a model can be edited."""
    with _client(context, base_url) as client:
        edit_directions = client.edits.directions(model)
    _print(
        context,
        as_json,
        [item.model_dump(mode="json") for item in edit_directions],
        lambda: text.format_directions(edit_directions),
    )


@app.command("edit")
def edit_images(
    context: typer.Context,
    sample: Annotated[
        list[str] | None, typer.Option("--sample", help="CLASS:SEED:INDEX, such as malignant:0:7; can be repeated.")
    ] = None,
    projection: Annotated[
        list[str] | None, typer.Option("--projection", help="ID:IMAGE of a finished projection; can be repeated.")
    ] = None,
    edit: text.EditOption = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", help="DIRECTION=FROM:TO:STEPS, such as sefa-1=-3:3:7: every sample at each strength."),
    ] = None,
    model: Model = None,
    truncation_psi: Psi = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every image into this folder.")] = None,
    strip: Annotated[Path | None, typer.Option("--strip", help="Write one sheet: strip.png.")] = None,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Edit images along directions."""
    if out is None and strip is None:
        raise InvalidRequestError("give --out FOLDER for the images, --strip FILE.png for a sheet, or both")
    if strip is not None:
        text.format_of(strip)
    with _client(context, base_url) as client:
        result = client.edits.create(
            samples=[text.parse_sample(item) for item in sample or ()] or None,
            projections=[text.parse_projection(item) for item in projection or ()] or None,
            edits=text.parse_edits(edit),
            sweep=text.parse_sweep(sweep),
            model=model,
            truncation_psi=truncation_psi,
        )
    written = result.save(out) if out is not None else []
    if strip is not None:
        write_atomically(strip, text.encode(result.strip(), strip))
        written.append(strip)
    output = {"model": result.model.model_dump(mode="json"), "files": [str(path) for path in written]}
    _print(context, as_json, output, lambda: map(str, written))


@app.command()
def project(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG or WebP.", show_default=False)],
    out: Out,
    model: Model = None,
    schedule: Annotated[
        params.ProjectionSchedule | None, typer.Option("--schedule", help="fast (default) or official.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimisation steps; default: the schedule's.")] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class of all images; default: the one whose mean image is nearest.")
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Also make a GIF of each optimisation.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the projection on the service, to edit it.")] = False,
    base_url: BaseUrl = None,
    as_json: Json = False,
) -> None:
    """Find the latents whose images are nearest to these, download them, and delete them from the service."""
    with _client(context, base_url) as client:
        record = client.projections.create(
            files, model=model, schedule=schedule, steps=steps, class_name=class_name, video=video or None
        )
        _note(record.id)
        with text.interrupt_message(f"interrupted; {record.id} continues until it is deleted or expires"):
            record = client.projections.wait(record.id, progress=True)
            written = client.projections.download(record.id, out)
        if not keep:
            client.projections.delete(record.id)
    output = {**record.model_dump(mode="json"), "downloaded": [str(path) for path in written]}
    _print(context, as_json, output, lambda: text.format_projection(record, files, keep))


@app.command()
def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A downloaded dataset, or its images.zip.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check a downloaded folder against its manifest.json; needs no service."""
    report = folders.verify(folder)
    output = {**asdict(report), "folder": str(folder), "ok": report.ok}
    _print(context, as_json, output, lambda: text.format_verification(report))
    if not report.ok:
        raise typer.Exit(1)


def main() -> None:
    """Run the program.

    The exit status is 0, 1 after an error, 2 for wrong usage, or 130 after Ctrl-C. An error is one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a class name
    try:
        with text.warnings_on_stderr():
            status = app(standalone_mode=False)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended, as with `dermis-client ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # output at exit must not fail either
        sys.exit(1)  # the status that Typer uses in this case
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted", 130))
    except (DermisError, OSError) as error:
        sys.exit(_fail(text.in_options(str(error)), 1))
    except Exception as error:
        message = text.usage_message(error)
        if message is None:
            raise
        sys.exit(_fail(message, 2) if message else 2)
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    print(f"error: {one_line(message, limit=2000)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
