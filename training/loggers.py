"""Curves and pictures of a training in TensorBoard, MLflow or Weights & Biases. The packages are optional.

A logger gets names of curves, numbers, sample grids and the options of the training, and nothing else: no command line, no
environment, no paths and no source code. A logger that fails ends with one warning, and the training continues without it.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, cast, get_args

from dermis.errors import TrainingError, escape, install_command
from dermis.files import write_file

LoggerName = Literal["tensorboard", "mlflow", "wandb"]
LOGGERS: tuple[LoggerName, ...] = get_args(LoggerName)
_EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)[^/@\s]+@")
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Logger(Protocol):
    """Where curves and pictures of a training go. A step is the number of images or epochs."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """Add a PNG file. Its bytes are kept, as its metadata says how it was made."""

    def close(self) -> None:
        """Write what is left."""


class Loggers:
    """Several loggers as one. One that fails is closed with a warning, and the others continue.

    Args:
        loggers: The loggers by name.
        warn: Shows a warning.
    """

    def __init__(self, loggers: Mapping[LoggerName, Callable[[], Logger]], warn: Callable[[str], None]) -> None:
        self._open: dict[LoggerName, Logger] = {}
        self._warn = warn
        for name, make in loggers.items():
            try:
                self._open[name] = make()
            except TrainingError:
                raise
            except Exception as error:
                self._failed(name, error)

    def __bool__(self) -> bool:
        return bool(self._open)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve of each logger."""
        self._each(lambda logger: logger.scalars(values, step))

    def image(self, name: str, png: bytes, step: int) -> None:
        """Add a PNG file to each logger."""
        self._each(lambda logger: logger.image(name, png, step))

    def close(self) -> None:
        """Close all."""
        self._each(lambda logger: logger.close())
        self._open.clear()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                act(logger)
            except Exception as error:  # of any kind: libraries, networks, disks
                del self._open[name]
                self._failed(name, error)

    def _failed(self, name: LoggerName, error: Exception) -> None:
        self._warn(f"warning: --log {name}: {without_secrets(error)}; the training continues without it")


def check_loggers(names: Sequence[str]) -> tuple[LoggerName, ...]:
    """Check the names of loggers and that their packages are installed.

    Returns:
        The names, each once.

    Raises:
        TrainingError: A name is not known, or a package is missing.
    """
    for name in names:
        if name not in LOGGERS:
            raise TrainingError(f"--log: {escape(name)} is none of {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"--log {name}: needs the package {name}: {install_command(_EXTRAS[name])}")
    return tuple(dict.fromkeys(cast("Sequence[LoggerName]", names)))


def open_loggers(
    names: Sequence[str], out: Path, step: int, options: Mapping[str, Any] | None = None, *, enabled: bool = True
) -> Loggers:
    """Open loggers for the run in a folder. A run that is resumed continues its curves.

    Args:
        names: Names of loggers.
        out: The run folder, which holds the files of loggers that write locally.
        step: The first step is after this one. TensorBoard hides later points, which a run wrote before it crashed.
        options: Options of the training, which are logged.
        enabled: False in processes that write nothing.

    Raises:
        TrainingError: A name is not known, or a package is missing.
    """
    if not enabled:
        return Loggers({}, _warn)
    kinds: dict[LoggerName, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorboardLogger(out, step),
        "mlflow": lambda: MlflowLogger(out, options or {}),
        "wandb": lambda: WandbLogger(out, options or {}),
    }
    return Loggers({name: kinds[name] for name in check_loggers(names)}, _warn)


def without_secrets(error: object) -> str:
    """Return the text of an error in one line, without logins in addresses and values of secret environment variables."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    return escape(_LOGIN.sub("***@", text), 300)


class TensorboardLogger:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, png: bytes, step: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = Image.open(io.BytesIO(png)).size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self._writer.file_writer.add_summary(summary, step)  # `add_image` would encode the pixels again

    def close(self) -> None:
        self._writer.close()


class MlflowLogger:
    """A run of MLflow at MLFLOW_TRACKING_URI, by default in the file mlflow.db of the run folder.

    Its experiment is MLFLOW_EXPERIMENT_NAME, by default dermis. Its id is kept in the run folder, so that a training that is
    resumed continues it.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        # An MLflow server that is down would otherwise stop a training for minutes at each point.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        local = not address
        self._client = MlflowClient(tracking_uri=address or f"sqlite:///{(out / 'mlflow.db').absolute()}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dermis"
        known = self._client.get_experiment_by_name(name)
        place = (out / "mlflow").absolute().as_uri() if local else None
        experiment = known.experiment_id if known else self._client.create_experiment(name, artifact_location=place)
        kept = _kept_id(out / "mlflow-run")
        if kept is None:
            kept = self._client.create_run(experiment, run_name=out.absolute().name).info.run_id
            values = [Param(key, str(value)[:500]) for key, value in options.items()]
            self._client.log_batch(kept, params=values)
            write_file(out / "mlflow-run", kept.encode())
        else:
            self._client.update_run(kept, status="RUNNING")
        self._run = kept

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[self._metric(name, float(value), now, step) for name, value in values.items()]
        )

    def image(self, name: str, png: bytes, step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{step:09d}.png"
            path.write_bytes(png)
            self._client.log_artifact(self._run, str(path), artifact_path=name)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandbLogger:
    """A run of Weights & Biases: online if WANDB_API_KEY is set or WANDB_MODE says so, otherwise in the run folder alone.

    Its project is WANDB_PROJECT, by default dermis. Nothing but curves, pictures and options of the training is logged.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        kept = _kept_id(out / "wandb-run") or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "dermis",
            name=out.absolute().name,
            id=kept,
            resume="allow",
            dir=str(out),
            config=dict(options),
            mode=cast("Any", os.environ.get("WANDB_MODE") or online),
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
            ),
        )
        write_file(out / "wandb-run", kept.encode())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def image(self, name: str, png: bytes, step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{step:09d}.png"
            path.write_bytes(png)
            self._run.log({name: self._wandb.Image(str(path)), "step": step})  # copies the file

    def close(self) -> None:
        self._run.finish()


def _kept_id(path: Path) -> str | None:
    """Return the id of a run that is continued; None if there is none."""
    try:
        text = path.read_text()[:100].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _RUN_ID.fullmatch(text) else None


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
