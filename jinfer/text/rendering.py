"""One chat template and what it needs, ready to render requests. Imports jinja2 alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from jinfer.errors import RequestError
from jinfer.text.dropped import check_shown
from jinfer.text.messages import fit, refused, unusual_fields
from jinfer.text.sandbox import TemplateEnvironment, TemplateLimitError
from jinfer.text.special_text import SpecialText, unescaped
from jinfer.text.template_needs import ABSENT, Needs, study

# Marks where the last message ends. Its trailing space shows whether the template trims what it prints.
_END_MARK = "END_OF_THE_MESSAGE_TO_CONTINUE "
_PROBE_SECONDS = 0.5
CANNOT_RENDER = "the model's chat template cannot render these messages"


class Renderer:
    """Renders one template.

    Args:
      source: Jinja source; a jinja2.TemplateSyntaxError where it is none.
      special_tokens: name (`"bos_token"`) to text; templates print them.
      max_characters, max_seconds: of one rendering.
      needs: what `Needs.to_json` gave of this template; None: it is studied.
      guarded: texts of special tokens, which strings of a request are not to become.
      guard_ignores_case: in any case.
      arm: called with the seconds that what follows may take at most.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        max_characters: int,
        max_seconds: float,
        *,
        needs: Mapping[str, Any] | None = None,
        guarded: Sequence[str] = (),
        guard_ignores_case: bool = False,
        arm: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._arm = arm
        self._arm(max_seconds)
        self._source = source
        self._max_seconds = max_seconds
        self._until = 0.0
        self._special_tokens = dict(special_tokens)
        self._environment = TemplateEnvironment(max_characters, max_seconds)
        self._template = self._environment.from_string(source)
        self.needs = (
            study(self._environment.parse(source), self._probe) if needs is None else Needs.from_json(needs)
        )
        self._guarded, self._ignores_case = guarded, guard_ignores_case
        self._special = SpecialText(guarded, self.needs.sought, guard_ignores_case)

    def _guard(self, spellings: Sequence[str]) -> SpecialText:
        if not spellings:
            return self._special
        return SpecialText([*self._guarded, *spellings], self.needs.sought, self._ignores_case)

    def render(self, request: Mapping[str, Any]) -> tuple[str, str | None]:
        """The prompt of a request; and the mark in it that tells a client's text from special tokens, if there is one.

        Where no tool may be called, tools that the template cannot show are left out.

        Args:
          request: `messages`, `tools`, `documents`, `variables`, `add_generation_prompt`, `continue_final_message`,
            `tools_are_optional`, `allows_special_tokens`, and `spellings`: more texts that are guarded in this request.

        Raises:
          RequestError: the messages cannot be rendered, or not without losing something of them.
        """
        # The check for what is lost renders again; all together take twice the time of one rendering at most.
        self._until = time.thread_time() + 2 * self._max_seconds
        try:
            return self._render(request)
        except RequestError:
            if not (request["tools"] and request["tools_are_optional"]):
                raise
            try:
                return self._render({**request, "tools": None})
            except RequestError:
                pass
            raise

    def _render(self, request: Mapping[str, Any]) -> tuple[str, str | None]:
        messages = fit(request["messages"], self.needs)
        given = {
            "messages": messages,
            "tools": request["tools"] or self.needs.empty_tools,
            "documents": request["documents"],
            **request["variables"],
        }
        if given["tools"] == ABSENT:
            del given["tools"]
        own = {**self._special_tokens, "add_generation_prompt": request["add_generation_prompt"]}
        marked, mark = given, None
        if not request["allows_special_tokens"]:
            marked, mark = self._guard(request["spellings"]).mark(given, self._source)
        ending = None
        if request["continue_final_message"]:
            last = dict(marked["messages"][-1])
            marked = {**marked, "messages": [*marked["messages"][:-1], last]}
            ending = self._mark_end(last)
        text = self._rendered(own | marked)
        if mark is not None:
            text = unescaped(text, mark)
        if ending is not None:
            text = _cut_at_mark(text, ending)
        clean = text if mark is None else text.replace(mark, "")
        joined = len(request["messages"]) - len(messages)
        check_shown(
            clean,
            own | given,
            self.needs,
            self._make,
            tools_are_optional=request["tools_are_optional"],
            is_continued=ending is not None,
            joined=joined,
        )
        self._check_unusual(own | given, joined)
        return text, mark if mark is not None and mark in text else None

    def _probe(self, variables: dict[str, Any]) -> str:
        self._arm(_PROBE_SECONDS)
        return self._environment.render(self._template, {**self._special_tokens, **variables}, _PROBE_SECONDS)

    def _make(self, variables: dict[str, Any]) -> str:
        seconds = min(self._max_seconds, self._until - time.thread_time())
        if seconds <= 0:
            raise TemplateLimitError(f"it ran longer than {self._max_seconds:g} seconds")
        self._arm(seconds)
        return self._environment.render(self._template, variables, seconds)

    def _rendered(self, variables: dict[str, Any]) -> str:
        try:
            return self._make(variables)
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except RecursionError:
            reason = "it calls itself without end"
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError) as error:
            # A template that meets a field it does not expect fails with whatever Python raises there.
            reason = f"{type(error).__name__}: {error}"
        raise refused(
            f"{CANNOT_RENDER}: {reason}. Check the roles, their order and the fields of each message"
        )

    def _check_unusual(self, variables: dict[str, Any], joined: int) -> None:
        """Raises RequestError for a field of messages that the template reads, but not here."""
        messages = variables["messages"]
        for name in sorted(unusual_fields(messages)):
            without = [{k: v for k, v in message.items() if k != name} for message in messages]
            try:
                acts = self._make(variables) != self._make(variables | {"messages": without})
            except Exception:
                acts = True
            if not acts:
                i = next(i for i, message in enumerate(messages) if name in message)
                raise refused(
                    f"messages[{i + joined if i else 0}].{name[:100]} is not supported: it changes nothing of what the "
                    "model's chat template shows, remove it",
                    code="unsupported_field",
                )

    def _mark_end(self, message: dict[str, Any]) -> str:
        """Appends the mark to the message's text, in place; returns the text it had."""
        content = message.get("content")
        if content is None or "content" not in self.needs.fields:
            raise refused("continue_final_message: the last message has no content")
        if not content and message.get("tool_calls"):
            raise refused(
                "continue_final_message: the last message has tool calls and no content to go on with"
            )
        if isinstance(content, str):
            message["content"] = content + _END_MARK
            return content
        text = content[-1]["text"]
        message["content"] = [*content[:-1], {**content[-1], "text": text + _END_MARK}]
        return text


def _cut_at_mark(text: str, ending: str) -> str:
    at = text.rfind(_END_MARK.strip())
    if at < 0 or ending.strip() not in text:
        raise RequestError(
            "continue_final_message: the model's chat template leaves out or changes the last message, so it "
            "cannot be continued",
            "continue_final_message",
        )
    # A template that trims the message also trimmed the mark's space; then the message's own end goes too.
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()
