"""`dermis push ...`: upload datasets and bundles to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import BundleArgument

push_app = typer.Typer(no_args_is_help=True, help="Upload a dataset or a bundle to the Hugging Face Hub.")

ToOption = Annotated[
    str, typer.Option("--to", help="Repository, as hub:ORG/NAME. The token is that of HF_TOKEN.", show_default=False)
]
PublicOption = Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")]


@push_app.command("dataset")
def push_dataset(
    dataset: Annotated[Path, typer.Argument(help="Folder of a finished dataset.", show_default=False)],
    to: ToOption,
    public: PublicOption = False,
) -> None:
    """Verify a dataset and upload its files, which `load_dataset` then reads from the Hub."""
    from dermis.exports import hub

    target = hub.hub_target(to)
    typer.echo(f"{dataset}: {hub.push_dataset(dataset, target, public=public)}")


@push_app.command("bundle")
def push_bundle(
    bundle: BundleArgument,
    to: ToOption,
    public: PublicOption = False,
    include_index: Annotated[
        bool,
        typer.Option("--include-index", help="Also upload the parts that reveal whether an image is a training image."),
    ] = False,
) -> None:
    """Verify a bundle and upload it to the folder bundle/ of a repository, with its card as README.md."""
    from dermis.bundle import open_bundle
    from dermis.exports import hub

    target = hub.hub_target(to)
    opened = open_bundle(bundle)
    address = hub.push_bundle(opened, target, public=public, include_index=include_index)
    typer.echo(f"{opened.name}@{opened.digest}: {address}")
