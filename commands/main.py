"""`dermis`: one command line for training, bundles, offline generation and verification."""

from __future__ import annotations

import io
import os
import sys

import typer

from commands.admin import admin_app
from commands.audit import audit_app
from commands.augment import augment_app
from commands.authenticity import authenticity_app
from commands.bundle import bundle_app
from commands.cite import cite
from commands.classify import classify
from commands.console import error_message, usage_message
from commands.data import data_app
from commands.directions import directions_app
from commands.evaluate import evaluate
from commands.experiment import experiment_app
from commands.explain import explain_app
from commands.export import export_app
from commands.federate import federate_app
from commands.generate import generate
from commands.index import index_app
from commands.keys import keys_app
from commands.privacy import privacy_app
from commands.project import project
from commands.push import push_app
from commands.serve import serve as serve_http
from commands.serve import worker
from commands.signing import sign_dataset
from commands.studio import studio
from commands.survey import survey_app
from commands.train import train_app
from commands.verify import verify
from dermis import __version__
from dermis.cpus import keep_freed_memory
from dermis.errors import DermisError, escape

app = typer.Typer(
    name="dermis",
    help="Synthetic dermoscopy: train generators, make and verify datasets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(experiment_app, name="experiment")
app.add_typer(federate_app, name="federate")
app.add_typer(bundle_app, name="bundle")
app.add_typer(export_app, name="export")
app.add_typer(push_app, name="push")
app.add_typer(explain_app, name="explain")
app.add_typer(augment_app, name="augment")
app.add_typer(survey_app, name="survey")
app.add_typer(directions_app, name="directions")
app.add_typer(index_app, name="index")
app.add_typer(authenticity_app, name="authenticity")
app.add_typer(privacy_app, name="privacy")
app.command()(project)
app.command()(classify)
app.command()(evaluate)
app.command()(generate)
app.command()(verify)
app.command()(cite)
app.command("sign")(sign_dataset)
app.command("serve")(serve_http)
app.command()(worker)
app.command()(studio)
app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.add_typer(admin_app, name="admin")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Synthetic dermoscopy: train generators, make and verify datasets."""


def main() -> None:
    """Run the program. Errors that the user can correct are one line on stderr: status 1, or 2 for wrong usage."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that Apple GPUs lack run on the CPU
    keep_freed_memory()  # a command is one short-lived process that computes on large blocks
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an old terminal cannot show all letters of a class name
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # for instance `dermis ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python writes at exit
        sys.exit(1)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted", 130))
    except DermisError as error:
        sys.exit(_fail(error_message(error), 1))
    except Exception as error:
        message = usage_message(error)
        if message is None:
            raise
        sys.exit(_fail(message, 2) if message else 2)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> int:
    lines = [escape(line, limit=4000) for line in message.splitlines()]
    print("error: " + "\n".join(lines), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
