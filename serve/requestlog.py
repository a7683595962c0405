"""One line per request in the server's log, where the operator asked for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar

from serve.generation import Choices, Job
from serve.state import State

logger = logging.getLogger("serve.requests")

# The X-Request-Id that came with the request that is being answered.
client_request_id: ContextVar[str | None] = ContextVar("client_request_id", default=None)


def logger_for(state: State, job: Job, kind: str) -> Callable[[Choices, str], None] | None:
    """A function to be called at the end of a request; None if requests are not logged. Prompts never are."""
    if state.config.disable_log_requests:
        return None
    start = time.monotonic()
    given = client_request_id.get()
    name = f"{job.request_id} ({given})" if given else job.request_id

    def log(choices: Choices, outcome: str) -> None:
        reasons = [c.finish_reason.value for c in choices.all if c.finish_reason]
        logger.info(
            "%s %s: %d prompt tokens, %d generated, %s in %.3f s",
            name,
            kind,
            sum(map(len, job.prompts)),
            choices.generated,
            ", ".join(sorted(set(reasons))) or outcome,
            time.monotonic() - start,
        )

    return log
