"""The training loop of a classifier: from images and a configuration to the network of the best epoch.

A run that is stopped, anywhere, and resumed computes what an uninterrupted one would have computed, bit for bit on the
CPU with the same number of threads and processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from dermis.files import atomic_write
from dermis.metrics.classification import auc
from training.classifier.batches import TrainingSet, epoch_order, read_ahead, to_float, turned
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealPart
from training.classifier.network import freeze, learning_mode
from training.classifier.state import CHECKPOINT, Progress, State, load_state, new_state, save_state
from training.gan.journal import require_tensorboard
from training.gan.parallel import Ranks
from training.interrupt import stop_requested

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
    tensorboard: bool = False,
    progress_bar: bool = True,
    features: tuple[Tensor, Tensor] | None = None,
) -> tuple[TorchClassifier, Progress]:
    """Train until `epochs` or until the monitor has not improved for `patience` of them; the best epoch's network.

    Writes into `out`: checkpoint.safetensors after each epoch, log.jsonl (one line an epoch), config.json. `data`
    identifies the images, for a resumed run. SIGINT and SIGTERM finish the step, save and return. A run that has ended
    already returns what it had. `features` [N, D] of the training and of the validation images spare a run with
    `cached_features` computing them. Raises TrainingError if the loss is not finite or the checkpoint does not fit.
    """
    if (out / CHECKPOINT).exists() and not resume:
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    network.to(ranks.device)
    frozen = freeze(network, config)
    state = new_state(network, config)
    if (out / CHECKPOINT).exists():
        load_state(out, state, config, data)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    progress = state.progress
    if config.cached_features and features is None:
        measured = TrainingSet((validation.images,), validation.labels)
        features = tuple(all_features(network, each, ranks, progress_bar) for each in (training, measured))  # type: ignore[assignment]
    learnt, seen = features if config.cached_features and features is not None else (None, None)
    quiet = not (progress_bar and ranks.first)
    clock = time.monotonic()
    with (
        stop_requested(insist=ranks.count > 1) as stop,
        _curves(out, progress.epoch, ranks.first and tensorboard) as curves,
    ):
        while not _ended(progress, config):
            order = epoch_order(training.labels, config, progress.epoch, ranks)
            learning_mode(network, frozen)
            with (
                closing(training_batches(training, learnt, order[progress.step :], ranks)) as steps,
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
                _end_epoch(state, validation, seen, config, ranks, len(order), clock)
                clock = time.monotonic()
                curves(progress)
                progress.stopped = ranks.any(stop.is_set()) and not _ended(progress, config)
            if ranks.first:
                save_state(out, state, config, data)
                _write_log(out / "log.jsonl", progress)
            if progress.stopped:
                break
    return state.best.eval(), progress


@torch.inference_mode()
def logits_of(network: TorchClassifier, images: NDArray[np.uint8], device: torch.device) -> NDArray[np.float64]:
    """float64 [N] of uint8 [N, S, S, 3], in eval mode and float32."""
    network.to(device).eval()
    found = [
        network(to_float(torch.tensor(images[i : i + EVALUATION_BATCH], device=device)))[0].cpu()
        for i in range(0, len(images), EVALUATION_BATCH)
    ]
    return torch.cat(found).double().numpy()


@torch.inference_mode()
def logits_of_features(network: TorchClassifier, features: Tensor) -> NDArray[np.float64]:
    """float64 [N] of features [N, D] on the network's device, in eval mode."""
    return network.eval().logit(features).cpu().double().numpy()


def class_weights(labels: NDArray[np.int64], config: ClassifierConfig) -> tuple[float, float]:
    """Weights of benign and malignant images in the loss: with `balance` "weights" each class weighs half of all."""
    if config.balance != "weights":
        return 1.0, 1.0
    share = float(labels.mean())
    return 0.5 / (1 - share), 0.5 / share


def seen_share(training: TrainingSet, config: ClassifierConfig) -> float:
    """Share of positives as the loss sees it."""
    return training.positive_share if config.balance == "none" else 0.5


def training_batches(
    training: TrainingSet, features: Tensor | None, order: NDArray[np.int64], ranks: Ranks
) -> Generator[tuple[NDArray[np.int64], Tensor]]:
    """Indices and images (or cached features) of each step."""
    if features is None:
        yield from read_ahead(training, order, ranks)
    else:
        for row in order:
            chosen = ranks.own(row)
            yield chosen, features[torch.from_numpy(chosen).to(features.device)]


def training_step(
    state: State,
    images: Tensor,
    labels: NDArray[np.int64],
    config: ClassifierConfig,
    training: TrainingSet,
    ranks: Ranks,
    adjust: Callable[[nn.Module], None] | None = None,
) -> None:
    """One step of Adam; everything random in it follows from seed, epoch, step and rank.

    `adjust` may add to the network's gradients before they are used.
    """
    network, progress = state.network, state.progress
    place = (progress.epoch << 20) + progress.step * ranks.count + ranks.rank + 1
    torch.manual_seed((config.seed << 32) + place)
    y = torch.from_numpy(labels).to(images.device)
    weights = torch.tensor(class_weights(training.labels, config), device=images.device)[y]
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        if config.cached_features:
            features = images
        else:
            x = to_float(images)
            if config.augmented:
                x = turned(x, config.rotation, config.flips)
            with torch.set_grad_enabled(not config.head_only):
                features = network.pooled(network.maps(x))
        logits = network.logit(F.dropout(features, config.dropout))
    loss = F.binary_cross_entropy_with_logits(logits.float(), y.float(), weight=weights)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    ranks.average_([p.grad for p in network.parameters() if p.grad is not None])
    if adjust is not None:
        adjust(network)
    state.optimizer.step()
    progress.loss_sum += float(ranks.mean(loss.detach()))
    progress.step += 1
    progress.images += config.batch


def _end_epoch(
    state: State,
    validation: RealPart,
    features: Tensor | None,
    config: ClassifierConfig,
    ranks: Ranks,
    steps: int,
    clock: float,
) -> None:
    """Measure on the validation part, keep the network if it is the best so far, and lower the rate if it is time."""
    progress, network = state.progress, state.network
    # Batch norms average the images of their own process only.
    ranks.average_([buffer for buffer in network.buffers() if buffer.is_floating_point()])
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


def _ended(progress: Progress, config: ClassifierConfig) -> bool:
    if progress.epoch >= config.epochs:
        return True
    return progress.epoch > 0 and progress.epoch - 1 - progress.best_epoch >= config.patience


@torch.no_grad()
def all_features(network: TorchClassifier, training: TrainingSet, ranks: Ranks, progress_bar: bool) -> Tensor:
    """Features [N, D] of all images, for runs in which they never change."""
    network.to(ranks.device).eval()
    starts = range(0, len(training), EVALUATION_BATCH)
    found = []
    for i in tqdm(starts, "features", disable=not (progress_bar and ranks.first)):
        images = training.read(np.arange(i, min(i + EVALUATION_BATCH, len(training))))
        found.append(network(to_float(torch.from_numpy(images).to(ranks.device)))[1])
    return torch.cat(found)


def _write_log(path: Path, progress: Progress) -> None:
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in progress.history), encoding="utf-8")


@contextmanager
def _curves(out: Path, epoch: int, wanted: bool) -> Iterator[Callable[[Progress], None]]:
    """Writes TensorBoard's points of the epoch that has just ended, if wanted; those that a resumed run makes again go."""
    if not wanted:
        yield lambda progress: None
        return
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    def write(progress: Progress) -> None:
        for name, value in progress.history[-1].items():
            if name != "epoch":
                writer.add_scalar(name, value, progress.epoch)

    with SummaryWriter(str(out / "tensorboard"), purge_step=epoch + 1) as writer:
        yield write
