"""The training loop of a classifier: from images and a configuration to the network of the best epoch.

A run that is stopped at any step and resumed computes the same as an uninterrupted one, bit for bit on the CPU with the same
number of threads and processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from dermis.files import atomic_write, write_file
from dermis.latents import mixed_seed
from dermis.metrics.classification import auc
from training.checkpoint import checkpoint_path, locked
from training.classifier.batches import TrainingSet, epoch_order, read_ahead, rotated_and_flipped, to_float
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealPart
from training.classifier.network import freeze, set_train_mode
from training.classifier.state import ClassifierProgress, ClassifierState, load_state, new_state, save_state
from training.distributed import Ranks
from training.interrupt import stop_requested
from training.loggers import open_loggers
from training.precision import float32_convolutions

EVALUATION_BATCH = 64


def train(
    network: TorchClassifier,
    training: TrainingSet,
    validation: RealPart,
    config: ClassifierConfig,
    out: Path,
    *,
    data: str,
    ranks: Ranks,
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
    features: tuple[Tensor, Tensor] | None = None,
) -> tuple[TorchClassifier, ClassifierProgress]:
    """Train until `epochs`, or until the monitor has not improved for `patience` epochs.

    SIGINT and SIGTERM finish the step, save and return. Resuming a run that has ended returns its result.

    Args:
        network: The network to train, in place.
        training: Training images.
        validation: The images on which every epoch is measured.
        config: Hyper-parameters.
        out: Folder of the run. It gets checkpoint.safetensors after each epoch, log.jsonl (one line for each epoch) and
            config.json.
        data: Digest of the images. A run is resumed only with the same one.
        ranks: The processes; the first one writes.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show progress bars.
        features: Features [N, D] of the training and of the validation images, if they are known, for a run with
            `cached_features`.

    Returns:
        The network of the best epoch, and the progress of the run.

    Raises:
        TrainingError: Another training is running in `out`, the loss is not finite, or the checkpoint has other images or
            options.
    """
    checkpoint = checkpoint_path(out, resume=resume)
    with locked(out) if ranks.first else nullcontext():
        network.to(ranks.device)
        frozen = freeze(network, config)
        state = new_state(network, config)
        if checkpoint.exists():
            load_state(checkpoint, state, config, data)
        if ranks.first:
            write_file(out / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())
        progress = state.progress
        if config.cached_features and features is None:
            measured = TrainingSet((validation.images,), validation.labels)
            features = tuple(all_features(network, images, ranks, progress_bar) for images in (training, measured))  # type: ignore[assignment]
        training_features, validation_features = (
            features if config.cached_features and features is not None else (None, None)
        )
        quiet = not (progress_bar and ranks.first)
        clock = time.monotonic()
        with (
            stop_requested(ignore_repeated=ranks.count > 1) as stop,
            open_loggers(loggers, out, progress.epoch, config.to_dict(), enabled=ranks.first) as logged,
        ):
            while not _ended(progress, config):
                order = epoch_order(training.labels, config, progress.epoch, ranks)
                set_train_mode(network, frozen)
                with (
                    closing(training_batches(training, training_features, order[progress.step :], ranks)) as steps,
                    tqdm(
                        total=len(order),
                        initial=progress.step,
                        desc=f"epoch {progress.epoch + 1}",
                        unit="step",
                        disable=quiet,
                    ) as bar,
                ):
                    for chosen, images in steps:
                        training_step(state, images, training.labels[chosen], config, training, ranks)
                        now = time.monotonic()
                        progress.seconds, clock = progress.seconds + now - clock, now
                        bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.3f}", refresh=False)
                        bar.update()
                        if ranks.any(stop.is_set()):
                            break
                if not np.isfinite(progress.loss_sum):
                    raise TrainingError(
                        f"the loss became {progress.loss_sum} in epoch {progress.epoch + 1}; lower --learning-rate"
                    )
                if progress.step < len(order):
                    progress.stopped = True
                else:
                    _end_epoch(state, validation, validation_features, config, ranks, len(order), clock)
                    clock = time.monotonic()
                    points = {name: value for name, value in progress.history[-1].items() if name != "epoch"}
                    logged.scalars(points, progress.epoch)
                    progress.stopped = ranks.any(stop.is_set()) and not _ended(progress, config)
                if ranks.first:
                    save_state(checkpoint, state, config, data)
                    _write_log(out / "log.jsonl", progress)
                if progress.stopped:
                    break
    return state.best.eval(), progress


@torch.inference_mode()
@float32_convolutions()
def logits_of(network: TorchClassifier, images: NDArray[np.uint8], device: torch.device) -> NDArray[np.float64]:
    """Logits float64 [N] of images uint8 [N, S, S, 3], computed in eval mode and float32."""
    network.to(device).eval()
    logits = [
        network(to_float(torch.tensor(images[i : i + EVALUATION_BATCH], device=device)))[0].cpu()
        for i in range(0, len(images), EVALUATION_BATCH)
    ]
    return torch.cat(logits).double().numpy()


@torch.inference_mode()
def logits_of_features(network: TorchClassifier, features: Tensor) -> NDArray[np.float64]:
    """Logits float64 [N] of features [N, D] on the network's device, computed in eval mode."""
    return network.eval().logit(features).cpu().double().numpy()


def class_weights(labels: NDArray[np.int64], config: ClassifierConfig) -> tuple[float, float]:
    """Weights of benign and malignant images in the loss. With `balance` "weights" each class has half of the weight."""
    if config.balance != "weights":
        return 1.0, 1.0
    share = float(labels.mean())
    return 0.5 / (1 - share), 0.5 / share


def seen_share(training: TrainingSet, config: ClassifierConfig) -> float:
    """Share of positives that the loss sees."""
    return training.positive_share if config.balance == "none" else 0.5


def training_batches(
    training: TrainingSet, features: Tensor | None, order: NDArray[np.int64], ranks: Ranks
) -> Generator[tuple[NDArray[np.int64], Tensor]]:
    """Yield indices [n] and images (or cached features) of each step."""
    if features is None:
        yield from read_ahead(training, order, ranks)
    else:
        for row in order:
            chosen = ranks.rank_part(row)
            yield chosen, features[torch.from_numpy(chosen).to(features.device)]


def training_step(
    state: ClassifierState,
    images: Tensor,
    labels: NDArray[np.int64],
    config: ClassifierConfig,
    training: TrainingSet,
    ranks: Ranks,
    adjust: Callable[[nn.Module], None] | None = None,
) -> None:
    """Take one step of Adam. Everything random in it follows from seed, epoch, step and rank.

    Args:
        state: Network, optimizer and progress.
        images: This rank's images uint8 [n, S, S, 3], or their features [n, D] with `cached_features`.
        labels: Their labels int64 [n].
        config: Hyper-parameters.
        training: All training images, whose labels decide the weights of the classes.
        ranks: The processes.
        adjust: Adds to the network's gradients before they are used.
    """
    network, progress = state.network, state.progress
    torch.manual_seed(mixed_seed(config.seed, progress.epoch, progress.step * ranks.count + ranks.rank))
    y = torch.from_numpy(labels).to(images.device)
    weights = torch.tensor(class_weights(training.labels, config), device=images.device)[y]
    x = images
    if not config.cached_features:
        # Outside of autocast, which would compute the coordinates of the rotation in bfloat16.
        x = to_float(images)
        if config.augmented:
            x = rotated_and_flipped(x, config.rotation, config.flips)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        features = x
        if not config.cached_features:
            with torch.set_grad_enabled(not config.head_only):
                features = network.pooled(network.maps(x))
        logits = network.logit(F.dropout(features, config.dropout))
    loss = F.binary_cross_entropy_with_logits(logits.float(), y.float(), weight=weights)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    # Each process has updated the running averages of batch norms with its own images. A checkpoint has one set of them.
    ranks.average_([p.grad for p in network.parameters() if p.grad is not None] + _running_averages(network))
    if adjust is not None:
        adjust(network)
    state.optimizer.step()
    progress.loss_sum += float(ranks.mean(loss.detach()))
    progress.step += 1
    progress.images += config.batch


def _running_averages(network: nn.Module) -> list[Tensor]:
    """The means and variances of the batch norms that are not frozen."""
    return [
        buffer
        for module in network.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var")
    ]


def _end_epoch(
    state: ClassifierState,
    validation: RealPart,
    features: Tensor | None,
    config: ClassifierConfig,
    ranks: Ranks,
    steps: int,
    clock: float,
) -> None:
    """Measure on the validation part, keep the network if it is the best so far, and update the learning rate."""
    progress, network = state.progress, state.network
    if features is not None:
        logits = logits_of_features(network, features)
    else:
        logits = logits_of(network, validation.images, ranks.device)
    loss = float(F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(validation.labels).double()))
    progress.seconds += time.monotonic() - clock
    row = {
        "epoch": progress.epoch + 1,
        "images": progress.images,
        "seconds": round(progress.seconds, 2),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "train_loss": progress.loss_sum / steps,
        "validation_loss": loss,
        "validation_auc": float(auc(validation.labels, logits)[0]),
    }
    value = row[f"validation_{config.monitor}"]
    better = value > progress.best_value if config.monitor == "auc" else value < progress.best_value
    if progress.best_epoch < 0 or better:
        progress.best_epoch, progress.best_value = progress.epoch, value
        state.best.load_state_dict(network.state_dict())
    state.scheduler.step(value)
    progress.history.append(row)
    progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0


def _ended(progress: ClassifierProgress, config: ClassifierConfig) -> bool:
    if progress.epoch >= config.epochs:
        return True
    return progress.epoch > 0 and progress.epoch - 1 - progress.best_epoch >= config.patience


@torch.no_grad()
@float32_convolutions()
def all_features(network: TorchClassifier, training: TrainingSet, ranks: Ranks, progress_bar: bool) -> Tensor:
    """Features [N, D] of all images, for runs in which they do not change."""
    network.to(ranks.device).eval()
    starts = range(0, len(training), EVALUATION_BATCH)
    features = []
    for i in tqdm(starts, "features", disable=not (progress_bar and ranks.first)):
        images = training.read(np.arange(i, min(i + EVALUATION_BATCH, len(training))))
        features.append(network(to_float(torch.from_numpy(images).to(ranks.device)))[1])
    return torch.cat(features)


def _write_log(path: Path, progress: ClassifierProgress) -> None:
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in progress.history), encoding="utf-8")
