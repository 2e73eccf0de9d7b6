"""Everything that needs a GPU, in one command:

    python -m benchmarks.gpu --minutes M --out DIR [--tests] [--benchmarks] [--train CONFIG [--data D] [--resume STATE]]

In this order: the tests that need CUDA, the benchmarks, then training until the time is up. Each part is a process of its
own with a time limit of its own, so that a crash, a CUDA error or a hang of one does not end the others. It writes its
results immediately to DIR/results.jsonl and to standard output; its other output goes to DIR/log.txt. Without CUDA, or with
--tiny, the same parts run with tiny sizes. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.results import append, read

LOG_BYTES = 1 << 20  # size of the end of log.txt that is kept
GRACE_SECONDS = 15  # time for saving after SIGTERM
TINY_SECONDS = 30  # length of a training with tiny sizes, which only shows that it works
MIN_SECONDS = 10  # a part is not started if less time is left


@dataclass(frozen=True)
class Part:
    """A process of the run."""

    name: str
    seconds: float  # time limit of the process
    command: tuple[str, ...]


def measured_part(name: str, seconds: float, options: argparse.Namespace) -> Part:
    command = ["-m", "benchmarks.gpu.measure", name, "--out", str(options.out)]
    return Part(name, seconds, (*command, *(["--tiny"] if options.tiny else [])))


def parts_of(options: argparse.Namespace) -> list[Part]:
    """The requested tests and benchmarks, in their order."""
    parts = []
    if options.tests:
        parts.append(measured_part("tests", 240, options))
    if options.benchmarks:
        limits = {
            "machine": 60, "generation": 150, "training": 240, "projected-training": 180, "projection": 90,
            "classification": 60, "features": 45, "look-up": 60, "kernels": 90,
        }  # fmt: skip
        parts += [measured_part(name, seconds, options) for name, seconds in limits.items()]
    return [part for part in parts if not options.only or part.name in options.only]


def run(part: Part, seconds: float, out: Path) -> str:
    """Run a part for at most `seconds`; returns "done", "failed (status)" or "stopped after ... s"."""
    start = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n== {part.name}\n".encode())
        log.flush()
        process = subprocess.Popen([sys.executable, *part.command], stderr=log, start_new_session=True)
        try:
            process.wait(timeout=seconds)
            status = "done" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            end(process)
    elapsed = time.monotonic() - start
    line = {"part": part.name, "status": status, "seconds": round(elapsed, 1)}
    if status != "done":
        line["log"] = (out / "log.txt").read_bytes()[-2000:].decode(errors="replace")
    append(out, line)
    print(f"-- {part.name}: {status}, {elapsed:.0f} s", flush=True)
    return status


def end(process: subprocess.Popen[bytes]) -> None:
    """Let the process save and end, then kill it and all processes that it has started (compilers)."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5)):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def train_part(options: argparse.Namespace, seconds: float) -> Part:
    command = [
        "-m",
        "benchmarks.gpu.train",
        str(options.train),
        "--out",
        str(options.out),
        "--seconds",
        f"{seconds:.0f}",
    ]
    for name in ("data", "resume"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    overhead = TINY_SECONDS if options.tiny else GRACE_SECONDS / 2  # tiny runs share a busy machine with other tests
    return Part("train", seconds + overhead, (*command, *(["--tiny"] if options.tiny else [])))


def shorten(log: Path) -> None:
    """Keep the end of a long log."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(b"(the beginning was removed)\n" + log.read_bytes()[-LOG_BYTES:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="the whole run ends within this time")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; at most eight files")
    parser.add_argument("--tests", action="store_true", help="run the tests that need CUDA")
    parser.add_argument("--benchmarks", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts of tests and benchmarks")
    parser.add_argument("--train", type=Path, metavar="CONFIG", help="TOML file; train for the rest of the time")
    parser.add_argument("--data", type=Path, help="training images: any source that dermis reads")
    parser.add_argument("--resume", type=Path, metavar="STATE", help="state folder of an earlier run to continue")
    parser.add_argument("--train-share", type=float, default=0.5, help="smallest share of the time for training")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU; the default without CUDA")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    options.tiny = options.tiny or not torch.cuda.is_available()
    options.out.mkdir(parents=True, exist_ok=True)
    reserved = 60 * options.minutes * options.train_share if options.train else 0
    statuses = []
    for part in parts_of(options):
        left = deadline - time.monotonic() - reserved - GRACE_SECONDS
        if left < MIN_SECONDS:
            append(options.out, {"part": part.name, "status": "not started: no time left"})
            print(f"-- {part.name}: not started, no time left", flush=True)
            continue
        statuses.append(run(part, min(part.seconds, left), options.out))
    if options.train:
        left = deadline - time.monotonic() - GRACE_SECONDS
        part = train_part(options, min(max(left, MIN_SECONDS), TINY_SECONDS if options.tiny else math.inf))
        statuses.append(run(part, part.seconds, options.out))
    shorten(options.out / "log.txt")
    missed = [line["name"] for line in read(options.out) if line.get("met") is False and not line.get("tiny")]
    print(f"-- all parts: {', '.join(statuses) or 'none'}; targets missed: {', '.join(missed) or 'none'}", flush=True)
    return 0 if all(status == "done" for status in statuses) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`, which ends the current part
    sys.exit(main())
