"""transformers' `generate` on the same requests: static batches, padded on the left, greedy, on the CPU.

How a static batch is treated fairly: requests are batched in their order; a batch runs until its longest output is
done and only tokens up to each request's own length count; no end token stops a row, as none stops jinfer's; every
token is timed when `generate` hands it out, so a short request is not charged for its batch's longest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinfer import ConfigError
from tools.bench.figures import RequestRecord, RunResult
from tools.bench.machine import CpuWatch, num_cores
from tools.bench.workload import BenchRequest, shortened


class HFModel:
    """A model folder loaded by transformers, shared by the batch sizes that are tried.

    Args:
      dtype: torch's name of the type that jinfer computes in.

    Raises:
      ConfigError: torch is not installed, or transformers cannot load the folder.
    """

    def __init__(self, folder: Path, dtype: str, threads: int | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise ConfigError(
                "compare hf needs torch, which is not installed: pip install torch==2.13.0"
            ) from error
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads or num_cores())
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load {folder}: {' '.join(str(error).split())}") from error
        self.torch = torch
        self.model = model.eval()
        # jinfer runs with ignore_eos: an end token must not stop a row here either.
        self.model.generation_config.eos_token_id = None
        self.pad_id = 0  # any id will do: the attention mask hides it


class HFSystem:
    """Static batches of one size.

    Args:
      is_closed_loop: each batch arrives when the one before is done; otherwise all requests arrive at the start.
    """

    def __init__(self, hf: HFModel, batch_size: int, is_closed_loop: bool = False) -> None:
        self.hf = hf
        self.batch_size = batch_size
        self.is_closed_loop = is_closed_loop
        self.name = f"transformers, batch {batch_size}"

    def warm_up(self, requests: Sequence[BenchRequest]) -> None:
        self.run(shortened(list(requests))[: self.batch_size])

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        records = []
        watch = CpuWatch()
        begin = time.perf_counter()
        for at in range(0, len(requests), self.batch_size):
            arrival = time.perf_counter() if self.is_closed_loop else begin
            records += self._run_batch(requests[at : at + self.batch_size], arrival)
        return RunResult(records, others_cpu=watch.others())

    def _run_batch(self, batch: Sequence[BenchRequest], arrival: float) -> list[RequestRecord]:
        torch = self.hf.torch
        width = max(len(r.prompt) for r in batch)
        ids = torch.full((len(batch), width), self.hf.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        clock = _Clock()
        longest = max(r.max_tokens for r in batch)
        output = self.hf.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.hf.pad_id,
            streamer=clock,
        )
        rows = output[:, width:].tolist()
        times = clock.times[1:]  # the first call hands over the prompt
        if len(times) != longest or any(len(row) != longest for row in rows):
            raise RuntimeError(f"generate gave {len(times)} tokens where {longest} were asked for")
        return [
            RequestRecord(
                index=request.index,
                start=arrival,
                prompt_tokens=len(request.prompt),
                output_tokens=request.max_tokens,
                token_times=times[: request.max_tokens],
                end=times[request.max_tokens - 1],
                token_ids=row[: request.max_tokens],
            )
            for request, row in zip(batch, rows, strict=True)
        ]


class _Clock:
    """Stands in for a text streamer and keeps only the time of each call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
