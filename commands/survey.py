"""`dermis survey ...`: create a survey of real and generated images for experts, and score their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import (
    CACHE,
    DEMO_BUNDLE,
    BundleOption,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    MetadataOption,
    TruncationOption,
)

if TYPE_CHECKING:
    from rich.table import Table

    from dermis.reader_study import Rate, Rates
    from training.evaluation.survey_score import SurveyScore

survey_app = typer.Typer(no_args_is_help=True, help="Ask experts which images are real.")


@survey_app.command("create")
def create(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="New folder: for-experts/ to distribute, secret/ to keep.")],
    bundle: BundleOption = DEMO_BUNDLE,
    count: Annotated[int, typer.Option(help="Number of images, half of them real.")] = 200,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of everything, as secret as the key. Default: a random one, stored in the key."),
    ] = None,
    experts: Annotated[int, typer.Option(help="Number of pages, each with its own order, for one expert.")] = 1,
    with_diagnosis: Annotated[bool, typer.Option("--with-diagnosis", help="Ask for the class as well.")] = False,
    equal_classes: Annotated[
        bool,
        typer.Option(
            "--equal-classes", help="Use equal numbers of images of each class; default: the proportions of --data."
        ),
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; default: that of the bundle, at least 256.")
    ] = None,
    truncation_psi: TruncationOption = 1.0,
    class_column: ClassColumnOption = None,
    metadata: MetadataOption = None,
    cache: CacheOption = CACHE,
    device: DeviceOption = "auto",
) -> None:
    """Create a blinded set of real and generated images, a web page that asks about them, and the key with the solution."""
    import secrets

    import numpy as np

    from dermis.bundle import open_bundle
    from dermis.errors import DataError
    from dermis.latents import MAX_SEED
    from dermis.synthesizer import Synthesizer
    from training.data.isic import load_isic
    from training.evaluation.survey import FOR_EXPERTS, KEY, check_new, create_survey, plan_survey

    check_new(out)
    if seed is None:
        seed = secrets.randbelow(MAX_SEED)
    elif not 0 <= seed <= MAX_SEED:
        raise DataError(f"--seed: must lie in [0, 2**63 - 1]; got {seed}")
    opened = open_bundle(bundle)
    resolution = opened.generator.img_resolution
    dataset = load_isic(data, resolution, class_column=class_column, metadata=metadata, cache=cache)
    if opened.class_names and dataset.class_names != opened.class_names:
        data_classes, bundle_classes = (", ".join(names) for names in (dataset.class_names, opened.class_names))
        raise DataError(f"--data: {data}: has the classes {data_classes}, but the bundle {bundle_classes}")
    labels = dataset.labels if opened.class_names else np.zeros_like(dataset.labels)
    slots = plan_survey(labels, opened.class_names, count, seed, equal_classes=equal_classes)
    with Synthesizer(opened, device=device) as synthesizer:
        key = create_survey(
            slots,
            dataset,
            synthesizer,
            out,
            seed=seed,
            size=size or max(256, resolution),
            pages=experts,
            with_diagnosis=with_diagnosis,
            truncation_psi=truncation_psi,
            data_name=data.resolve().name,
        )
    pages = sorted((out / FOR_EXPERTS).glob("*.html"))
    megabytes = max(page.stat().st_size for page in pages) / 1e6
    typer.echo(f"survey {key.survey}: {count} images, {len(pages)} page(s) of {megabytes:.1f} MB")
    typer.echo(f"distribute: {out / FOR_EXPERTS}")
    typer.echo(f"keep secret: {out / KEY}")


@survey_app.command("score")
def score(
    key: Annotated[Path, typer.Argument(help="secret/key.json of the survey.", show_default=False)],
    answers: Annotated[list[Path], typer.Argument(help="Files answers-NAME.json of the experts.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead of tables.")] = False,
) -> None:
    """Compute accuracy with its confidence interval, rates for each class, response bias and agreement of experts."""
    import json
    from dataclasses import asdict

    from rich.markup import escape

    from training.evaluation.survey import read_key
    from training.evaluation.survey_score import read_answers, score_survey

    opened = read_key(key)
    result = score_survey(opened, read_answers(answers, opened))
    for expert in result.experts:
        if expert.missing:
            typer.echo(f"warning: {expert.expert} did not answer {expert.missing} of {result.images} images", err=True)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2, ensure_ascii=False))
        return
    console = table_console()
    console.print(_rates_table(result))
    console.print(_expert_table(result))
    for line in _sentences(result):
        console.print(escape(line), highlight=False)


def _rates_table(result: SurveyScore) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "",
        "answers",
        "accuracy",
        "sensitivity",
        "specificity",
        "called generated",
        title="rates in % with their 95 % intervals",
    )

    def add(name: str, rates: Rates) -> None:
        shown = (rates.accuracy, rates.sensitivity, rates.specificity, rates.called_generated)
        table.add_row(escape(name), str(rates.accuracy.total), *map(_percent, shown))

    add("all", result.rates)
    for name, rates in result.classes.items():
        add(f"  {name}", rates)
    table.add_section()
    for expert in result.experts:
        add(expert.expert, expert.rates)
    return table


def _expert_table(result: SurveyScore) -> Table:
    from rich.markup import escape
    from rich.table import Table

    has_diagnosis = any(expert.diagnosis_real or expert.diagnosis_generated for expert in result.experts)
    table = Table("expert", "open", "p", "d'", "c", "AUC", "s", title="experts" + ", diagnosis in %" * has_diagnosis)
    if has_diagnosis:
        table.add_column("diagnosis right: real")
        table.add_column("generated")
    for expert in result.experts:
        row = [escape(expert.expert), str(expert.missing), _p(expert.p_value), _number(expert.d_prime)]
        row += [_number(expert.criterion), _number(expert.auc), f"{expert.median_seconds:.1f}"]
        if has_diagnosis:
            row += [_percent(rate) if rate else "-" for rate in (expert.diagnosis_real, expert.diagnosis_generated)]
        table.add_row(*row)
    return table


def _sentences(result: SurveyScore) -> list[str]:
    accuracy = result.rates.accuracy
    lines = [f"p against chance, all answers together: {_p(result.p_value)}"]
    if result.agreement is not None:
        agreement = result.agreement
        observed = "-" if agreement.observed is None else f"{100 * agreement.observed:.0f} %"
        lines.append(
            f"agreement: Fleiss' kappa {_number(agreement.fleiss_kappa)}, observed {observed}, "
            f"on the {agreement.images} images that all answered"
        )
        lines += [f"  Cohen's kappa {a} - {b}: {_number(kappa)}" for a, b, kappa in agreement.pairs]
    if accuracy.low is not None and accuracy.high is not None:
        inside = accuracy.low <= result.paper_accuracy <= accuracy.high
        experts = f"{len(result.experts)} expert{'s' * (len(result.experts) > 1)}"
        lines.append(
            f"the paper (arXiv 2208.11702): {100 * result.paper_accuracy:.0f} % over four experts and 200 images; "
            f"here {_percent(accuracy)} % over {experts} and {result.images} images, "
            f"the 95 % interval {'contains' if inside else 'does not contain'} the paper's value"
        )
    return lines


def _percent(rate: Rate) -> str:
    if rate.share is None or rate.low is None or rate.high is None:
        return "-"
    return f"{100 * rate.share:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
