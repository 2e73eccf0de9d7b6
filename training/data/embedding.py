"""Embedding of many images: files are read and decoded in threads ahead of the network, under one progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.cpus import available_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")
Images = NDArray[np.uint8]
Extract = Callable[[Images], NDArray[np.float32]]

CHUNK = 64  # images of one call of the network
AHEAD = 4 * CHUNK  # decoded images that wait for it


def progress_bar(total: int, name: str, *, disable: bool | None = None) -> tqdm:
    """Of images; it shows the remaining time. It is left out where stderr is no terminal, unless `disable` says otherwise."""
    return tqdm(total=total, desc=name, unit="img", disable=disable, smoothing=0.05)


def ahead(function: Callable[[Item], Result], items: Sequence[Item], waiting: int = AHEAD) -> Iterator[Result]:
    """Results in the order of items, computed in threads, at most `waiting` of them ahead of the one that is asked for."""
    pool = ThreadPoolExecutor(available_cpus())
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > waiting:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def embed_array(images: Images, extract: Extract, bar: tqdm) -> NDArray[np.float32]:
    """Features [N, dim] of decoded images [N, H, W, 3], N at least 1, which may lie on disk."""
    parts = []
    for start in range(0, len(images), CHUNK):
        parts.append(extract(np.ascontiguousarray(images[start : start + CHUNK])))
        bar.update(len(parts[-1]))
    return np.concatenate(parts)
