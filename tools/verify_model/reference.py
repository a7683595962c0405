"""What transformers computes: logits and greedy tokens of a model folder, on the CPU in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinfer import ConfigError


class Reference:
    """A model folder loaded by transformers, with attention computed by its plainest implementation.

    Raises:
      ConfigError: torch or transformers is missing, or transformers cannot load or compute the model.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ConfigError(
                "verify_model needs torch and transformers: pip install jinfer[test]"
            ) from error
        disable_progress_bar()
        self.folder = folder
        with self._failing_to("load"):
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            packed = getattr(config, "quantization_config", None)
            if isinstance(packed, dict) and packed.get("quant_method") == "mxfp4":
                packed["dequantize"] = True  # computing with packed experts takes a package and a GPU
            has_parts = config.get_text_config() is not config
            model: Any = (AutoModelForImageTextToText if has_parts else AutoModelForCausalLM).from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
            )
        self.torch, self.model = torch, model.eval()
        # Generation goes on past an end token, as with ignore_eos; min_new_tokens would forbid it instead.
        model.generation_config.eos_token_id = None
        for part in (model.config, model.config.get_text_config()):
            part.eos_token_id = None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32[S, V] of one sequence."""
        with self._failing_to("compute"), self.torch.no_grad():
            self._forget()
            return self.model(self.torch.tensor([list(tokens)])).logits[0].float().numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
        """`count` greedy tokens, and the float32[count, V] logits that they were the largest of."""
        ids = self.torch.tensor([list(prompt)])
        with self._failing_to("compute"), self.torch.no_grad():
            self._forget()
            result = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        logits = self.torch.cat(result.logits).float().numpy()
        return result.sequences[0, len(prompt) :].tolist(), logits

    def _forget(self) -> None:
        # Rotary angles that grow with the length remember the longest sequence they saw.
        self.model(self.torch.zeros((1, 1), dtype=self.torch.long))

    @contextlib.contextmanager
    def _failing_to(self, verb: str) -> Iterator[None]:
        """What goes wrong inside is told in one line; transformers raises nearly every kind of exception."""
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"transformers cannot {verb} {self.folder}: {reason[:500]}") from error


def margin(logits: np.ndarray) -> float:
    """The smallest distance between the two largest logits of a row, as a share of the row's largest magnitude."""
    top = np.sort(logits, axis=-1)[..., -2:]
    return float(np.min((top[..., 1] - top[..., 0]) / np.abs(logits).max(-1)))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest deviation in a row as a share of the row's largest magnitude, over all rows."""
    return float(np.max(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))
