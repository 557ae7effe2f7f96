"""Decode and crop image files in worker processes, so that the image tower doesn't wait for them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from r1export.data.images import Decoding, decode
from r1export.errors import R1ExportError
from r1export.update.plain_text import printable
from r1export.verify.client_files import PreprocessConfig

AHEAD = 2  # batches of each worker that wait to be embedded, which bounds the memory


@dataclass(frozen=True)
class DecodedBatch:
    """`crops`, uint8 (k, H, W, 3), of the pictures at the positions `held` of the batch; `skipped`: position -> why not."""

    crops: np.ndarray
    held: tuple[int, ...]
    skipped: dict[int, str]


def decode_batch(paths: Sequence[str], config: PreprocessConfig) -> DecodedBatch:
    """Decode and crop images; unreadable ones have no crop."""
    fill = (config.fill_color,) * 3 if isinstance(config.fill_color, int) else config.fill_color
    decoding, crops, held, skipped = Decoding(fill=fill), [], [], {}
    for position, path in enumerate(paths):
        try:
            image: Image.Image = decode(Path(path), path, decoding).image
        except (R1ExportError, MemoryError) as error:
            skipped[position] = printable(getattr(error, "message", "out of memory"))[:300]
            continue
        crops.append(config.crop(image))
        held.append(position)
    shape = (0, *config.size, 3)
    return DecodedBatch(np.stack(crops) if crops else np.zeros(shape, np.uint8), tuple(held), skipped)


def decoded(batches: Sequence[Sequence[str]], config: PreprocessConfig, workers: int) -> Iterator[DecodedBatch]:
    """The batches in their order. At most AHEAD of each worker are in memory; with no `workers` decodes in this process."""
    if not workers:
        yield from (decode_batch(batch, config) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy onnxruntime's threads in an undefined state
    waiting: deque[Future[DecodedBatch]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(decode_batch, batch, config))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
