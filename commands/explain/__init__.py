"""`dermis explain ...`: heat maps, concepts, embeddings and edge cases of a classifier."""

from __future__ import annotations

import typer

from commands.explain.concepts import concepts
from commands.explain.edge_cases import edge_cases
from commands.explain.embeddings import embeddings
from commands.explain.heat_maps import heat_maps

explain_app = typer.Typer(
    help="Show what a classifier's decisions depend on. Not a medical device: for research only.", no_args_is_help=True
)
explain_app.command("concepts")(concepts)
explain_app.command("edge-cases")(edge_cases)
explain_app.command("embeddings")(embeddings)
explain_app.command("heat-maps")(heat_maps)
