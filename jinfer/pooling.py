"""Embeddings: one vector per prompt, pooled from the hidden states after the final norm. Host side, no jax here.

An embedding request is a prompt that goes through the engine's own steps, in chunks beside the sequences that
decode; the step sums the hidden states of its rows (`step.Pooled`), and what a prompt's chunks yield is put together
here. So it costs no program of its own, holds running streams up by no more than a prompt does, needs no memory that
grows with its length, and runs on every mesh and for every family.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jinfer.errors import RequestError
from jinfer.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

POOLINGS = ("last", "mean")
NAME_IT = "name the pooling ('last' or 'mean') in the request"
# What an embedding request asks of the sampler: a step yields a token at the end of every prompt, and it is dropped.
EMBED = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(frozen=True)
class PoolingParams:
    """How a prompt becomes one vector.

    pooling: "last": the hidden state of the last token; "mean": the mean over all tokens. normalize: scale the vector
    to length 1.
    """

    pooling: str = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RequestError(
                f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}", param="pooling"
            )
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize is {self.normalize!r}, expected true or false", param="normalize")


class PooledRows(Protocol):
    """What a step yields per row: float32[R, E], the last token's hidden state and the sum over its tokens."""

    @property
    def last(self) -> Any: ...

    @property
    def total(self) -> Any: ...


class Pool:
    """Puts one prompt's vector together from its chunks, in the order in which the steps ran."""

    def __init__(self, params: PoolingParams) -> None:
        self._params = params
        self._total: np.ndarray | None = None

    def add(self, table: PooledRows, row: int, start: int) -> None:
        """Takes one row of a step, whose first token is at position `start` of the prompt."""
        if self._params.pooling == "last":
            self._total = np.asarray(table.last[row], np.float64)
        elif start == 0 or self._total is None:  # a preempted prompt begins again
            self._total = np.asarray(table.total[row], np.float64)
        else:
            self._total = self._total + table.total[row]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers so far are."""
        return self._total is None or bool(np.isfinite(self._total).all())

    def vector(self, num_tokens: int) -> np.ndarray:
        """float32[E], once all `num_tokens` of the prompt have been added."""
        assert self._total is not None
        vector = self._total / num_tokens if self._params.pooling == "mean" else self._total
        if self._params.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype(np.float32)


class OwnPooling:
    """How a model says that its embeddings are pooled; its folder is read once, when this is made."""

    def __init__(self, folder: Path) -> None:
        self._params, self._problem = PoolingParams(), ""
        try:
            self._params = default_pooling(folder)
        except RequestError as error:
            # The model can still write text, and embed for those who name the pooling themselves.
            self._problem = str(error)
            logger.warning("embeddings: %s", error)

    def params(self) -> PoolingParams:
        """See `default_pooling`; raises what it raised."""
        if self._problem:
            raise RequestError(self._problem, param="pooling")
        return self._params


def default_pooling(folder: Path) -> PoolingParams:
    """What a sentence-transformers folder says by its modules.json; else the last token, normalized.

    Raises:
      RequestError: it pools in a way that is not supported, or one of its files is missing or cannot be read.
    """
    modules = _read(folder / "modules.json")
    if modules is None:
        return PoolingParams()
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise _problem(f"{folder / 'modules.json'} is not a list of objects")
    kinds = {str(m.get("type", "")).rpartition(".")[2]: str(m.get("path", "")) for m in modules}
    normalizes = "Normalize" in kinds
    if "Pooling" not in kinds:
        return PoolingParams(normalize=normalizes)
    place = (folder / kinds["Pooling"]).resolve()  # the file itself may be a link into a download cache
    file = place / "config.json"
    if not place.is_relative_to(folder.resolve()):
        raise _problem(f"modules.json asks for pooling by {file}, which is not in the model's folder")
    config = _read(file)
    if config is None:
        raise _problem(f"modules.json asks for pooling, and {file} is missing")
    if not isinstance(config, dict):
        raise _problem(f"{file} is not an object")
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    modes = [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
    known = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
    if len(modes) != 1 or modes[0] not in known or unknown:
        raise RequestError(
            f"the model's modules.json asks for {', '.join(modes + unknown) or 'no pooling'}, and only "
            f"{', '.join(known)} are supported: {NAME_IT}",
            param="pooling",
        )
    return PoolingParams(known[modes[0]], normalizes)


def _problem(what: str) -> RequestError:
    return RequestError(f"{what}: download the model again, or {NAME_IT}", param="pooling")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _problem(f"{file} cannot be read as JSON ({error})") from error
