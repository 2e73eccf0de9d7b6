"""`dermis federate key`, `check` and `join`: a client of a federation, such as a hospital."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import ClassColumnOption, DataOption, DeviceOption, MetadataOption

if TYPE_CHECKING:
    from training.federated.site import Site

InvitationArgument = Annotated[
    Path, typer.Argument(help="File that the server's operators sent (`dermis federate invite`).")
]
KeyOption = Annotated[Path, typer.Option(help="Private key of this site, made by `dermis federate key`.")]
StateOption = Annotated[Path, typer.Option(help="Folder for the state between rounds; it is never sent.")]
ThreadsOption = Annotated[int, typer.Option(help="Maximum number of CPU threads; 0: no limit.")]


def key(
    out: Annotated[
        Path, typer.Argument(help="File for the private key; the public key is written beside it with the suffix .pub.")
    ],
) -> None:
    """Make the keys of this site. Send the .pub file to the server's operators; the private key is never sent."""
    from training.federated.deployment.keys import write_client_key

    public = write_client_key(out)
    typer.echo(f"{public}: send this file to the server's operators; keep {out} here")


def check(
    invitation: InvitationArgument,
    data: DataOption,
    key: KeyOption,
    state: StateOption = Path(".dermis/federated"),
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
) -> None:
    """Check whether this site can join: versions, server, key, images, a round on generated images, memory and disk.

    No image of a patient is opened: images are counted from the CSV.
    """
    import logging

    from rich.table import Table

    from training.federated.deployment.invitation import read_invitation
    from training.federated.deployment.site_check import check_site

    logging.getLogger("flwr").setLevel(logging.ERROR)
    content = read_invitation(invitation)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    marks = {True: "[green]ok[/green]", False: "[red]no[/red]", None: "[yellow]?[/yellow]"}
    passed = True
    site = _site(data, state, metadata, class_column, device, threads)
    console = table_console()
    with console.status("checking"):
        for result in check_site(content, site, key):
            passed = passed and result.passed is True
            table.add_row(marks[result.passed], result.name, result.message)
    console.print(table)
    if not passed:
        raise typer.Exit(1)
    values = {"--data": data, "--metadata": metadata, "--class-column": class_column, "--key": key, "--state": state}
    options = " ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    typer.echo(f"this site can join: dermis federate join {invitation} {options}")


def join(
    invitation: InvitationArgument,
    data: DataOption,
    key: KeyOption,
    state: StateOption = Path(".dermis/federated"),
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Share of the images, by patient, that is used only for measuring a generator; default 0.2."),
    ] = None,
    require_secure_aggregation: Annotated[
        bool,
        typer.Option(
            "--require-secure-aggregation", help="Refuse to take part where the server can see the update of this site."
        ),
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    port: Annotated[int, typer.Option(help="Port of this client's own processes, on loopback.")] = 9094,
) -> None:
    """Run Flower's SuperNode with the images of this site, until Ctrl-C. It opens outgoing connections only, and reconnects."""
    import signal
    import subprocess
    from dataclasses import replace

    from dermis.errors import TrainingError
    from dermis.files import write_file
    from training.federated.deployment.flower_programs import environment, on_sigterm, supernode_command
    from training.federated.deployment.invitation import read_invitation
    from training.federated.site import CLASSIFIER_PARTS

    content = read_invitation(invitation)
    site = _site(data, state, metadata, class_column, device, threads)
    site = replace(site, require_secure_aggregation=require_secure_aggregation)
    if validation is not None:
        if content.config.task == "classifier":
            raise TrainingError(f"--validation: has no effect on a classifier, {CLASSIFIER_PARTS}; omit it")
        site = replace(site, validation=validation)
    if not data.exists():
        raise TrainingError(f"{data}: no such folder; --data is the folder with the images of this site")
    if not key.is_file():
        raise TrainingError(f"{key}: no such file; create one with dermis federate key")
    certificate = state / "ca.pem"
    write_file(certificate, content.certificate.encode())
    command = supernode_command(content, certificate, key, site, port)
    node = subprocess.Popen(command, env=environment(state / "flower"))
    with on_sigterm(node.terminate):
        try:
            code = node.wait()
        except KeyboardInterrupt:
            node.wait()
            return
    if code not in (0, -signal.SIGTERM):
        raise TrainingError(f"Flower's SuperNode ended with status {code}; its messages are above")


def _site(data: Path, state: Path, metadata: Path | None, class_column: str | None, device: str, threads: int) -> Site:
    from training.federated.site import Site

    return Site(
        data.resolve(),
        state.resolve(),
        metadata=metadata.resolve() if metadata else None,
        class_column=class_column,
        cache=state.resolve() / "cache",
        device=device,
        threads=threads,
    )
