"""One training in several processes, one for each GPU, as `torchrun` starts them: they compute what one process would.

Rank r of `count` has the samples r, r + count, r + 2 count, ... of every batch. The members of a group of the mini-batch
standard deviation are equally far apart in the batch. With this division, and not with blocks, each group lies on one rank
as long as the rank's part of the batch is a multiple of the group's size. Every rank draws the random numbers of the whole
batch and keeps its own part, so that a run does not depend on the number of ranks.

Gradients are averaged explicitly, with one collective call for each phase over one flat tensor. DistributedDataParallel
would need a `forward` that the phases of a GAN do not use (they call mapping, synthesis and discriminator in turn), and its
hooks would fire in the inner gradients of R1 and path length, which belong to one rank.
"""

from __future__ import annotations

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

TIMEOUT = timedelta(hours=2)  # how long the other ranks wait while rank 0 decodes images, saves and measures


@dataclass(frozen=True)
class Ranks:
    """This process among `count` processes. A single process needs no process group, and its calls here cost nothing."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # device of this rank

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def rank_part(self, x: Any) -> Any:
        """This rank's samples of a sequence, array or tensor that holds a whole batch."""
        return x[self.rank :: self.count]

    def draws(self, n: int) -> AbstractContextManager[object]:
        """Return a context manager. Inside it, random tensors with n samples are this rank's part of the full tensors.

        The full tensors are those that a single process would draw.
        """
        return nullcontext() if self.count == 1 else _RankDraws(self, n)

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
        """Whether the flag is set on any rank; all ranks get the same answer."""
        return float(self.mean(torch.tensor(float(flag), device=self.device))) > 0

    def gather(self, x: Tensor) -> Tensor:
        """The tensors [n, ...] of all ranks as [count * n, ...], in the order of the ranks."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, so that they can use what it has put into a cache."""
        if self.count > 1 and not self.first:
            dist.barrier()
        yield
        if self.count > 1 and self.first:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined_ranks(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started.

    Args:
        device: Device of the training. On CUDA each process takes the GPU of its LOCAL_RANK and they communicate with NCCL,
            elsewhere with gloo.
        environment: The variables that `torchrun` sets. Without them this process is the only one.

    Raises:
        TrainingError: There are fewer GPUs than processes, or the device is for one process only.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device=device)
        return
    if device.type in ("mps", "xpu"):
        raise TrainingError(f"device: several processes train on cuda or cpu, not on {device.type}; start one process")
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


class _RankDraws(TorchFunctionMode):
    """Draw random tensors for the whole batch instead of the rank's part, and keep the rank's own samples.

    The batch is the first dimension of size n. Tensors without such a dimension (one choice for all samples) are drawn
    unchanged. They are equal on all ranks, because all ranks have the same seed and make the same draws.
    """

    def __init__(self, ranks: Ranks, n: int) -> None:
        super().__init__()
        self.ranks, self.n = ranks, n

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _LIKE:  # a shape is not enough: the layout in memory decides the order of the numbers
            return self.ranks.rank_part(func(torch.cat([args[0]] * self.ranks.count), *args[1:], **options))
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
        return self.ranks.rank_part(func(*bounds, size, **options).movedim(dim, 0)).movedim(0, dim)
