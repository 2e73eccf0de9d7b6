"""`dermis federate ...` at a hospital: its key, whether it can join, and joining."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from training.federated.site import Site

InvitationArgument = Annotated[Path, typer.Argument(help="The server's invitation.")]
DataOption = Annotated[Path, typer.Option(help="This hospital's images: anything that `dermis data` reads.")]
KeyOption = Annotated[Path, typer.Option(help="This hospital's private key, made by dermis federate key.")]
StateOption = Annotated[Path, typer.Option(help="Folder for what is kept between rounds; it never leaves.")]
MetadataOption = Annotated[Path | None, typer.Option(help="CSV file; default: metadata.csv in --data.")]
ClassColumnOption = Annotated[str | None, typer.Option(help="CSV column of the classes; default: target, ...")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ThreadsOption = Annotated[int, typer.Option(help="Most threads on a CPU; 0: no limit.")]


def key(out: Annotated[Path, typer.Argument(help="File for the private key; the public one gets .pub.")]) -> None:
    """Make this hospital's key. Send the .pub to the server's people; the other never leaves."""
    from training.federated.deployment.keys import write_member_key

    public = write_member_key(out)
    typer.echo(f"{public}: send this one to the server's people; {out} stays here")


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
    """Can this site join? Versions, server, key, images, a round on generated images, memory, disk: one screen.

    No image of a patient is opened; they are counted by their table.
    """
    import logging

    from rich.table import Table

    from training.federated.deployment.invitation import read_invitation
    from training.federated.deployment.site_check import check_site

    logging.getLogger("flwr").setLevel(logging.ERROR)
    asked = read_invitation(invitation)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    marks = {True: "[green]ok[/green]", False: "[red]no[/red]", None: "[yellow]?[/yellow]"}
    good = True
    site = _site(data, state, metadata, class_column, device, threads)
    console = table_console()
    with console.status("looking"):
        for finding in check_site(asked, site, key):
            good = good and finding.ok is True
            table.add_row(marks[finding.ok], finding.what, finding.says)
    console.print(table)
    if not good:
        raise typer.Exit(1)
    given = {"--data": data, "--metadata": metadata, "--class-column": class_column, "--key": key, "--state": state}
    options = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    typer.echo(f"this site can join: dermis federate join {invitation} {options}")


def join(
    invitation: InvitationArgument,
    data: DataOption,
    key: KeyOption,
    state: StateOption = Path(".dermis/federated"),
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    validation: Annotated[float, typer.Option(help="Share of the images, by patient, that only measures.")] = 0.2,
    require_secure_aggregation: Annotated[
        bool,
        typer.Option("--require-secure-aggregation", help="Take no part where the server sees this site's update."),
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    port: Annotated[int, typer.Option(help="Of this member's own processes, on loopback.")] = 9094,
) -> None:
    """Run Flower's SuperNode with this hospital's images, until Ctrl-C. It calls out only, and comes back after a break."""
    import subprocess
    from dataclasses import replace

    from dermis.errors import TrainingError
    from dermis.files import write_file
    from training.federated.deployment.flower_programs import environment, supernode_command
    from training.federated.deployment.invitation import read_invitation

    asked = read_invitation(invitation)
    site = _site(data, state, metadata, class_column, device, threads)
    site = replace(site, validation=validation, require_secure_aggregation=require_secure_aggregation)
    if not data.exists():
        raise TrainingError(f"{data}: no such folder; --data names this hospital's images")
    if not key.is_file():
        raise TrainingError(f"{key}: no such file; dermis federate key makes one")
    certificate = state / "ca.pem"
    write_file(certificate, asked.certificate.encode())
    command = supernode_command(asked, certificate, key, site, port)
    node = subprocess.Popen(command, env=environment(state / "flower"))
    try:
        code = node.wait()
    except KeyboardInterrupt:
        node.wait()
        return
    if code:
        raise TrainingError(f"Flower's SuperNode ended with {code}; what it says stands above")


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
