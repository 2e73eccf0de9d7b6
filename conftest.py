"""Settings of all tests."""

from __future__ import annotations

import signal

from dermis.cpus import keep_freed_memory

keep_freed_memory()  # as in the tested programs

# A job in the background of a script starts with SIGINT ignored, and so would every program that a test starts and
# then interrupts; a handler of our own is reset to the default at exec.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
