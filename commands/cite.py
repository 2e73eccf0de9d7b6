"""`dermis cite`: BibTeX and a paragraph for the methods section of a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def cite(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|BUNDLE",
            help="Folder or fsspec URL of a finished dataset or of a bundle, or the name of an installed bundle.",
            show_default=False,
        ),
    ],
    show: Annotated[
        Literal["all", "bibtex", "methods"], typer.Option(help="What to print: BibTeX, the paragraph, or both.")
    ] = "all",
    style: Annotated[
        Literal["markdown", "latex"],
        typer.Option(help="How the paragraph refers to the BibTeX entries: \\[@key] or \\cite{key}."),
    ] = "markdown",
    author: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help='An author, "Family, Given" or the name of a group; can be repeated.'),
    ] = None,
    year: Annotated[int | None, typer.Option(help="Year of publication.")] = None,
    doi: Annotated[str, typer.Option(metavar="DOI", help="DOI, such as 10.5281/zenodo.1234567.")] = "",
    url: Annotated[str, typer.Option(metavar="URL", help="Address at which it is published.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Write into this file instead, such as refs.bib.")] = None,
) -> None:
    """Print how to cite a dataset or a bundle: BibTeX, and a paragraph for a methods section.

    The paragraph names model, training data, seed, options, gate, measured numbers with their intervals, licence and version.
    Read it before you publish it: it does not know how you used the images.
    """
    from dermis.citation import Publication
    from dermis.citation import cite as cite_place
    from dermis.files import write_file

    citation = cite_place(place, Publication(" and ".join(author or ()), year, doi, url))
    texts = {"bibtex": citation.bibtex, "methods": citation.methods(style)}
    text = "\n".join(texts.values()) if show == "all" else texts[show]
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_file(out, text.encode())
        typer.echo(f"{out}: written")
    if citation.advice and show != "methods":
        typer.echo(f"note: {citation.advice}", err=True)
