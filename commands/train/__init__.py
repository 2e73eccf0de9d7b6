"""`dermis train ...`: generators, classifiers and encoders."""

from __future__ import annotations

import typer

from commands.train.classifier import train_classifier
from commands.train.encoder import train_encoder
from commands.train.gan import train_gan

train_app = typer.Typer(no_args_is_help=True, help="Train generators, classifiers and encoders.")
train_app.command("gan")(train_gan)
train_app.command("classifier")(train_classifier)
train_app.command("encoder")(train_encoder)
