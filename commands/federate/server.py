"""`dermis federate init`, `serve`, `invite`, `register` and `run`: the server of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.federate.options import (
    FederationOption,
    IterationsOption,
    NameOption,
    ResolutionOption,
    RoundsOption,
    SeedOption,
    StartOption,
    StrategyOption,
    TaskOption,
    federation_config,
    full_path,
)
from commands.options import AttributionOption, LicenceOption, LogOption, SettingsOption

ServerArgument = Annotated[Path, typer.Argument(help="Folder of the server.")]


def init(
    server: ServerArgument,
    host: Annotated[
        list[str], typer.Option(help="Name or address under which clients reach the server; may be repeated.")
    ],
    port: Annotated[int, typer.Option(help="Port for clients; Flower uses the next one, on loopback.")] = 8800,
) -> None:
    """Create the folder of a server, with its certificates and Flower's settings."""
    from training.federated.deployment.server_folder import new_server

    created = new_server(server, host, port)
    typer.echo(f"{server}: start it with dermis federate serve {server}; clients connect to {host[0]}:{created.port}")


def serve(
    server: ServerArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "0.0.0.0",  # noqa: S104
) -> None:
    """Run Flower's SuperLink behind a proxy that admits registered clients only. Ctrl-C ends both."""
    import subprocess
    import sys

    import uvicorn

    from dermis.errors import TrainingError
    from training.federated.deployment.fleet_proxy import fleet_proxy
    from training.federated.deployment.flower_programs import environment, on_sigterm, superlink_command
    from training.federated.deployment.keys import CA, CERTIFICATE, KEY
    from training.federated.deployment.server_folder import open_server

    opened = open_server(server)
    certificates = opened.certificates
    with on_sigterm(sys.exit):  # uvicorn sends SIGTERM to this process again after it has stopped
        superlink = subprocess.Popen(superlink_command(opened), env=environment(opened.flower_home))
        try:
            app = fleet_proxy(f"https://127.0.0.1:{opened.loopback_port}", str(opened.loopback_certificates / CA))
            uvicorn.run(
                app,
                host=host,
                port=opened.port,
                ssl_certfile=str(certificates / CERTIFICATE),
                ssl_keyfile=str(certificates / KEY),
                log_level="warning",
            )
            if (code := superlink.poll()) not in (None, 0, -2, -15):
                raise TrainingError(f"{server}: Flower's server ended with status {code}; its messages are above")
        finally:
            superlink.terminate()
            superlink.wait()


def register(
    server: ServerArgument,
    public_key: Annotated[Path, typer.Argument(help="Public key that a client sent.")],
    name: Annotated[
        str, typer.Option(help="Name of the client for the server's operators; it stays on the server.")
    ] = "",
) -> None:
    """Register a client, so that it can join."""
    from training.federated.deployment.flower_programs import register as run
    from training.federated.deployment.server_folder import open_server

    node = run(open_server(server), public_key, name)
    typer.echo(f"{public_key}: registered as node {node}")


def invite(
    server: ServerArgument,
    out: Annotated[Path, typer.Option(help="File for the clients; nothing in it is secret.")],
    min_images: Annotated[int, typer.Option(help="Minimum number of images of a client.")] = 100,
    task: TaskOption = "gan",
    rounds: RoundsOption = 100,
    iterations: IterationsOption = 100,
    resolution: ResolutionOption = 64,
    name: NameOption = "federation",
    settings: SettingsOption = None,
    options: FederationOption = None,
    seed: SeedOption = 0,
) -> None:
    """Write the file that a site needs to check itself and to join: address, certificate, versions and size of the training."""
    from training.federated.deployment.invitation import write_invitation
    from training.federated.deployment.server_folder import open_server

    federation = federation_config(
        settings,
        options,
        task=task,
        rounds=rounds,
        iterations=iterations,
        resolution=resolution,
        name=name,
        seed=seed,
    )
    write_invitation(out, open_server(server), federation, min_images)
    typer.echo(f"{out}: send it to the sites, for dermis federate check and join")


def run_federation(
    server: ServerArgument,
    task: TaskOption = "gan",
    rounds: RoundsOption = 100,
    iterations: IterationsOption = 100,
    resolution: ResolutionOption = 64,
    strategy: StrategyOption = "fedavg",
    name: NameOption = "federation",
    settings: SettingsOption = None,
    options: FederationOption = None,
    start: StartOption = "",
    seed: SeedOption = 0,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    log: LogOption = None,
) -> None:
    """Train with the clients that are online; a run that is in SERVER/runs/NAME is continued.

    Ctrl-C ends the display, not the run. `flwr stop` ends a run; the same command continues it.
    """
    import json
    import subprocess
    import tempfile

    from dermis.errors import TrainingError
    from training.federated.deployment.flower_programs import environment, run_command
    from training.federated.deployment.server_folder import open_server
    from training.federated.server.global_state import as_begun
    from training.loggers import check_loggers

    opened, loggers = open_server(server), check_loggers(log or ())
    federation = federation_config(
        settings,
        options,
        task=task,
        rounds=rounds,
        iterations=iterations,
        resolution=resolution,
        strategy=strategy,
        name=name,
        start=full_path(start),
        seed=seed,
        licence=licence,
        attribution=attribution,
    )
    out = opened.run_folder(federation.name)
    federation = as_begun(federation, out)
    if federation.task == "classifier" and federation.start not in ("", "imagenet", "none"):
        raise TrainingError(
            f"--from: {federation.start}: each client makes the frozen layers of a classifier itself, and has no such file; "
            "give imagenet or none, or omit --from"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = run_command(opened, federation, Path(folder) / "run.toml", loggers)
        try:
            code = subprocess.run(command, env=environment(opened.flower_home), check=False).returncode
        except KeyboardInterrupt:
            typer.echo(f"the run continues; watch it with dermis federate watch {out}", err=True)
            raise typer.Exit(130) from None
    if code:
        raise TrainingError(f"{server}: Flower did not accept the run; is dermis federate serve running?")
    try:
        status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TrainingError(f"{out}: the run did not start; Flower's messages are above") from None
    if status["phase"] != "finished":
        raise TrainingError(f"{out}: {status.get('error', status['phase'])}; run the same command again to continue")
    if status["round"] < federation.rounds:  # the status of an earlier run with fewer rounds
        raise TrainingError(
            f"{out}: the run ended after {status['round']} of {federation.rounds} rounds; Flower's messages are above"
        )
    typer.echo(f"{out}: {status['round']} rounds, {len(status['members'])} clients")
