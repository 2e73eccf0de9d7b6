"""`dermis explain`: what a classifier looks at."""

from __future__ import annotations

import typer

from commands.explain_concepts import concepts
from commands.explain_edge_cases import edge_cases
from commands.explain_embeddings import embeddings
from commands.explain_heat_maps import heat_maps

explain_app = typer.Typer(help="Show what a classifier looks at. Not a medical device.", no_args_is_help=True)
explain_app.command("concepts")(concepts)
explain_app.command("edge-cases")(edge_cases)
explain_app.command("embeddings")(embeddings)
explain_app.command("heat-maps")(heat_maps)


@explain_app.callback()
def _root() -> None:
    """Show what a classifier looks at. Not a medical device: for research only."""
