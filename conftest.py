"""Settings of all tests."""

from __future__ import annotations

import functools
import signal
from importlib.util import find_spec

from dermis.cpus import keep_freed_memory

keep_freed_memory()  # as in the tested programs

# The GPU tests also run where Hypothesis is not installed.
if find_spec("hypothesis"):
    from hypothesis import settings

    # A deadline for each example would make tests fail when other programs keep the processor busy.
    settings.register_profile("dermis", deadline=None)
    settings.load_profile("dermis")

# Typer builds the tree of all commands for each call of a command, which takes longer than most of the calls.
if find_spec("typer"):
    import typer.main
    import typer.testing

    typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)

# A job in the background of a script starts with SIGINT ignored, and so would every program that a test starts and
# then interrupts; a handler of our own is reset to the default at exec.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
