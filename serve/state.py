"""What the endpoints of one server share."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinfer import AsyncEngine, EngineDeadError, RequestError, SamplingParams, ServerConfig
from serve.inputs import check_token_ids
from serve.logprobs import TokenTexts
from serve.metrics import Metrics
from serve.params import Limits
from serve.protocol import APIError, bad_request, prompt_too_long, unavailable
from serve.work import Pace, Room, Workers

T = TypeVar("T")

ROOM = 8  # of the largest bodies at once


class State:
    """The engine and the settings, and where the server stands: starting, accepting, draining."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        make_chat_template: Callable[[AsyncEngine], Any] | None = None,
    ) -> None:
        self._make_chat_template = make_chat_template
        self.engine = engine
        self.config = config
        self.draining = False
        self.active = 0  # HTTP requests that are being answered
        self.created = int(time.time())
        self.started = time.monotonic()
        self.metrics = Metrics(self.model_name, self._read_stats, config.metrics_prefix)
        self._workers = Workers()
        self.room = Room(ROOM * config.max_body_bytes)
        self.pace = Pace()

    @property
    def model_name(self) -> str:
        """The name in answers and metrics."""
        return self.model_names[0]

    @functools.cached_property
    def model_root(self) -> str:
        """The model without where it lies: a hub id, or the name of a folder."""
        return _short_name(self.engine.model_name)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use."""
        return self.config.served_model_name or (self.model_root,)

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.engine.tokenizer)

    @functools.cached_property
    def chat_template(self) -> Any:
        """The operator's chat template, or the model's own; None if there is none. Asked for once ready."""
        if self._make_chat_template is not None:
            return self._make_chat_template(self.engine)
        return self.engine.chat_template

    def prepare_chat_template(self) -> None:
        """Lets the template be studied before the first chat comes. Takes a fraction of a second."""
        if self.chat_template is not None:
            self.chat_template.prepare()

    @property
    def limits(self) -> Limits:
        priority = self.engine.config.scheduling_policy == "priority"
        return Limits(max_logprobs=self.config.max_logprobs, uses_priority=priority)

    def check_accepting(self, shows_error: bool = True) -> None:
        """Raises APIError (503) if no request can be taken now. shows_error: with the words of a failed engine, which
        may quote paths and the like."""
        if not self.engine.is_healthy:
            error = (shows_error and self.engine.error) or "see the log"
            raise unavailable(
                f"the engine has failed ({error}): restart the server",
                "engine_dead",
                retry_after=30,
            )
        if self.draining:
            raise unavailable(
                "the server is shutting down: send the request elsewhere or later", "shutting_down", 5
            )
        if not self.engine.is_ready:
            raise unavailable("the model is still loading: ask again when /ready answers 200", "not_ready", 2)

    def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """The token ids of a prompt's text. Raises APIError (400) for one with more tokens than the model takes.

        For a thread, unless the text is short. One that is too long by its characters alone is not tokenized.
        """
        with self.refusing_long_prompts(param):
            most = self.engine.max_model_len
            return self.engine.tokenizer.encode(text, add_special_tokens, max_tokens=most)

    @contextlib.contextmanager
    def refusing_long_prompts(self, param: str) -> Iterator[None]:
        """Makes the tokenizer's refusal of a long text an APIError (400) in the words that clients know."""
        most = self.engine.max_model_len
        try:
            yield
        except RequestError as error:
            if error.param != "prompt":
                raise
            raise prompt_too_long(f"{error} (max_model_len is {most})", param, most) from error

    def validate(
        self, ids: Sequence[int], params: SamplingParams, param: str, *, prompt_only: bool = False
    ) -> Sequence[int]:
        """The prompt as the engine takes it without another check. Raises APIError (400) if it could not run it."""
        if not ids:
            raise bad_request("the prompt has no tokens: give at least one", param)
        check_token_ids(ids, self.engine.vocab_size, param)
        try:
            return self.engine.validate(ids, params, prompt_only=prompt_only)
        except RequestError as error:
            name = param if error.param == "prompt" else error.param
            if error.param == "prompt" and len(ids) >= self.engine.max_model_len:
                raise prompt_too_long(str(error), param, self.engine.max_model_len) from error
            raise bad_request(str(error), name) from error

    def check_model(self, name: str | None) -> None:
        """Raises APIError (404) if a request names a model that is not served. None or '' names none."""
        if name and name not in self.model_names:
            raise APIError(
                404,
                f"the model {name[:200]!r} does not exist here: this server has "
                f"{', '.join(map(repr, self.model_names))}",
                param="model",
                code="model_not_found",
            )

    async def in_thread(self, function: Callable[..., T], *args: Any, large: bool = False) -> T:
        """Runs what may take long on a thread, so that the streams of other requests go on; see `Workers.run`."""
        return await self._workers.run(function, *args, large=large)

    def close(self) -> None:
        self._workers.close()

    def _read_stats(self) -> Any:
        try:
            return self.engine.stats()
        except EngineDeadError:  # still loading: there is nothing to count yet
            return None


def _short_name(model: str) -> str:
    if not os.path.isdir(model):
        return model
    folder = Path(os.path.abspath(model))
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        # A folder of the hub's cache is named as a commit.
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name or model
