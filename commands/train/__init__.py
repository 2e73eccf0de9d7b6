"""`dermis train ...`: generators, classifiers, encoders and copy detectors."""

from __future__ import annotations

import typer

from commands.train.classifier import train_classifier
from commands.train.copy_detector import train_copy_detector
from commands.train.encoder import train_encoder
from commands.train.gan import train_gan

train_app = typer.Typer(no_args_is_help=True, help="Train generators, classifiers, encoders and copy detectors.")
train_app.command("gan")(train_gan)
train_app.command("classifier")(train_classifier)
train_app.command("encoder")(train_encoder)
train_app.command("copy-detector")(train_copy_detector)
