"""The input pipeline: documents packed into rows of a fixed length, served by grain.

A row is a pure function of (seed, length, row number), so the pipeline has no state to save: resuming at step
`n` is asking for the rows from `n * batch` on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from tools.tiny.documents import DocumentEncoder, Encoded, draw_conversation, draw_plain_story
from tools.tiny.tokenizer import load_tokenizer

_MAX_ROWS = 1 << 30
_TRIES = 4
Batch = dict[str, np.ndarray]


class PackedRows(grain.sources.RandomAccessDataSource):
    """Rows of `length + 1` tokens: conversations while they fit, the rest filled with the start of a story."""

    def __init__(self, tokenizer_folder: Path, seed: int, length: int):
        self._folder, self._seed, self._length = tokenizer_folder, seed, length
        self._encoder = DocumentEncoder(load_tokenizer(tokenizer_folder))

    def __len__(self) -> int:
        return _MAX_ROWS

    def __repr__(self) -> str:
        return f"PackedRows(seed={self._seed}, length={self._length})"

    def _documents(self, rng: random.Random, room: int) -> Iterator[Encoded]:
        """Yields documents that fill exactly `room` tokens; only the last one may be cut off."""
        tries = 0
        while room > 0:
            plain = tries >= _TRIES or rng.random() < 0.05
            if plain:
                document = self._encoder.plain(draw_plain_story(rng))
                document = Encoded(document.tokens[:room], document.weights[:room])
            else:
                document = self._encoder.conversation(draw_conversation(rng, self._length))
            if len(document.tokens) > room:
                tries += 1
                continue
            room -= len(document.tokens)
            yield document

    def __getitem__(self, record_key: int) -> Batch:
        rng = random.Random(f"rows/{self._seed}/{self._length}/{int(record_key)}")
        tokens: list[int] = []
        weights: list[float] = []
        segments: list[int] = []
        for number, document in enumerate(self._documents(rng, self._length + 1)):
            tokens += document.tokens
            weights += document.weights
            segments += [number] * len(document.tokens)
        # A document's first token is its <|bos|>, of weight 0: no prediction crosses a border.
        return {
            "inputs": np.asarray(tokens[:-1], np.int32),
            "targets": np.asarray(tokens[1:], np.int32),
            "weights": np.asarray(weights[1:], np.float32),
            "segments": np.asarray(segments[:-1], np.int32),
        }


def batches(tokenizer_folder: Path, seed: int, length: int, batch: int, start: int = 0) -> Iterator[Batch]:
    """Yields batches from number `start` on: int32 `inputs`, `targets`, `segments`, float32 `weights`, `[B, T]`."""
    rows = grain.MapDataset.source(PackedRows(tokenizer_folder, seed, length))[start * batch :]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * batch)
    return iter(rows.to_iter_dataset(options).batch(batch, drop_remainder=True))
