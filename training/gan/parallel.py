"""One run on several processes, one a GPU, as `torchrun` starts them: they compute what one process would.

Rank r of `count` has the samples r, r + count, r + 2 count, ... of every batch. Taken so, and not in blocks, the groups of
the mini-batch standard deviation, whose members are equally far apart, each lie on one rank as long as its part of the
batch is a multiple of the group's size. Every rank draws the random numbers of the whole batch and keeps its own, so
that a run does not depend on how many ranks it has.

Gradients are averaged explicitly, one collective call a phase over one flat tensor. DistributedDataParallel would have
to hook into a `forward` that our phases do not go through (they call mapping, synthesis and discriminator in turn), and
its hooks would fire in the inner gradients of R1 and path length, which belong to one rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dermis.errors import TrainingError
from training.gan.config import GanConfig

TIMEOUT = timedelta(hours=2)  # how long the others wait while rank 0 decodes images, saves and measures


@dataclass(frozen=True)
class Ranks:
    """This process's place among `count`. Alone it needs no process group, and nothing here costs it anything."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where this rank computes

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0

    def own(self, x: Any) -> Any:
        """This rank's samples of a sequence, array or tensor that holds a whole batch."""
        return x[self.rank :: self.count]

    def draws(self, n: int) -> AbstractContextManager[object]:
        """Random tensors drawn inside for this rank's n samples are its part of what one process would draw."""
        return nullcontext() if self.count == 1 else _OwnDraws(self, n)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over the ranks, without its gradient."""
        if self.count == 1:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the ranks."""
        if self.count == 1 or not tensors:
            return
        flat = self.mean(torch.cat([x.flatten() for x in tensors]))
        for x, mean in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all get the same answer."""
        return float(self.mean(torch.tensor(float(flag), device=self.device))) > 0

    def gather(self, x: Tensor) -> Tensor:
        """The tensors [n, ...] of all ranks, one rank after another."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """Rank 0 runs the block before the others, so that they find what it has put into a cache."""
        if self.count > 1 and not self.first:
            dist.barrier()
        yield
        if self.count > 1 and self.first:
            dist.barrier()

    def check_batch(self, config: GanConfig) -> None:
        """TrainingError if the batch cannot be divided so that the ranks compute what one process would."""
        group = min(config.group_size, config.batch)
        shrink = config.pl_batch_shrink if config.pl_weight else 1
        unit = self.count * math.lcm(group, shrink)
        if self.count > 1 and config.batch % unit:
            raise TrainingError(
                f"batch: {config.batch} must be a multiple of {unit} for {self.count} processes: each takes whole "
                f"groups of {group} (mbstd_group_size), divisible by {shrink} (pl_batch_shrink)"
            )


ALONE = Ranks()


def automatic_batch(resolution: int, count: int) -> int | None:
    """The official batch for several GPUs: that of one for each, 64 at most. None for one: the configuration's own."""
    return None if count == 1 else max(min(count * min(4096 // resolution, 32), 64), count)


@contextmanager
def joined_ranks(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started; without it, a lone rank on `device`.

    On CUDA each takes the GPU of its LOCAL_RANK and they talk by NCCL, elsewhere by gloo.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        local, present = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= present:
            raise TrainingError(f"--nproc-per-node: process {local} has no GPU; torch sees {present}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


_FACTORIES: tuple[Callable[..., Tensor], ...] = (torch.rand, torch.randn, torch.randint)
_LIKE: tuple[Callable[..., Tensor], ...] = (torch.rand_like, torch.randn_like)


class _OwnDraws(TorchFunctionMode):
    """Draws for a local batch become draws for the whole batch, of which the rank's own samples are kept.

    The batch is the first dimension of size n. Tensors without one (a single choice for all samples) are drawn as they
    are, alike on all ranks, because all have the same seed and make the same draws.
    """

    def __init__(self, ranks: Ranks, n: int) -> None:
        super().__init__()
        self.ranks, self.n = ranks, n

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _LIKE:  # not by shape alone: the layout in memory decides the order of the numbers
            return self.ranks.own(func(torch.cat([args[0]] * self.ranks.count), *args[1:], **options))
        if func not in _FACTORIES:
            return func(*args, **options)
        bounds: tuple[Any, ...] = ()
        if "size" in options:
            bounds, size = args, options.pop("size")
        elif func is torch.randint:
            bounds, size = args[:-1], args[-1]
        else:
            size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        size = list(size)
        if self.n not in size:
            return func(*bounds, size, **options)
        dim = size.index(self.n)
        size[dim] *= self.ranks.count
        return self.ranks.own(func(*bounds, size, **options).movedim(dim, 0)).movedim(0, dim)
