"""The histories that clients send, each with the words that a prompt made of it has to hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class History:
    """A conversation as a client sends it.

    Attributes:
      words: what the prompt has to hold.
      loose: words that a template may leave out by its habit: reasoning, and what an earlier turn said beside a call.
    """

    messages: list[dict[str, Any]]
    words: tuple[str, ...]
    loose: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def user(content: Any = "userword") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "answerword", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(content: Any, number: int = 1, as_text: bool = True, **fields: Any) -> dict[str, Any]:
    calls = []
    for i in range(1, number + 1):
        arguments: Any = {"city": f"cityword{i}"}
        arguments = json.dumps(arguments) if as_text else arguments
        function = {"name": "get_current_weather", "arguments": arguments}
        calls.append({"id": f"abcdefgh{i}", "type": "function", "function": function})
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def result(content: Any = "resultword", number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdefgh{number}", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "toolword",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city"}},
                "required": ["city"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "systemword"}
DEVELOPER = {"role": "developer", "content": "developerword"}
ABSENT = {key: value for key, value in call(None).items() if key != "content"}
CALLED = ("userword", "cityword1")
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}


def histories() -> dict[str, History]:
    """The histories by name."""
    ending = [assistant("finalword"), user("secondword")]
    answered = [result(), *ending]
    shown = (*CALLED, "resultword", "finalword", "secondword")
    return {
        "user": History([user()], ("userword",)),
        "user, no generation prompt": History(
            [user()], ("userword",), options={"add_generation_prompt": False}
        ),
        "several turns": History(
            [user(), assistant(), user("secondword")], ("userword", "answerword", "secondword")
        ),
        "system": History([SYSTEM, user()], ("systemword", "userword")),
        "developer": History([DEVELOPER, user()], ("developerword", "userword")),
        "system and developer": History(
            [SYSTEM, DEVELOPER, user()], ("systemword", "developerword", "userword")
        ),
        "a later system message": History(
            [SYSTEM, user(), assistant(), {"role": "system", "content": "lateword"}, user("secondword")],
            ("systemword", "userword", "answerword", "lateword", "secondword"),
        ),
        "tools": History([user()], ("userword", "toolword"), options={"tools": TOOLS}),
        "system and tools": History(
            [SYSTEM, user()], ("systemword", "userword", "toolword"), options={"tools": TOOLS}
        ),
        "tools, tool_choice none": History(
            [user()], ("userword",), ("toolword",), {"tools": TOOLS, "tools_are_optional": True}
        ),
        "no tools: []": History([user()], ("userword",), options={"tools": []}),
        "call, content null": History([user(), call(None), *answered], shown),
        "call, content empty": History([user(), call(""), *answered], shown),
        "call, content absent": History([user(), ABSENT, *answered], shown),
        "call, content text": History([user(), call("besideword"), *answered], shown, ("besideword",)),
        "call, content text, in progress": History(
            [user(), call("besideword"), result()], (*CALLED, "resultword", "besideword")
        ),
        "call, arguments object": History([user(), call(None, as_text=False), *answered], shown),
        "call and tools": History(
            [user(), call(None), *answered], (*shown, "toolword"), options={"tools": TOOLS}
        ),
        "call in progress": History(
            [user(), call(None), result()], (*CALLED, "resultword", "toolword"), options={"tools": TOOLS}
        ),
        "call without arguments": History(
            [user(), _without_arguments(), *answered],
            ("userword", "get_current_weather", "resultword", "finalword", "secondword"),
        ),
        "two calls": History(
            [user(), call(None, 2), result("firstresult", 1), result("otherresult", 2), *ending],
            (*CALLED, "cityword2", "firstresult", "otherresult", "finalword", "secondword"),
        ),
        "result as parts": History(
            [user(), call(None), result(parts("resultword", "partword")), *ending], (*shown, "partword")
        ),
        "named result": History([user(), call(None), result(name="get_current_weather"), *ending], shown),
        "empty tool_calls": History(
            [user(), assistant(tool_calls=[]), user("secondword")], ("userword", "answerword", "secondword")
        ),
        "empty fields": History(
            [
                user() | {"name": None},
                assistant(tool_calls=None, reasoning_content="", refusal=None, audio=None, annotations=[]),
                user("secondword"),
            ],
            ("userword", "answerword", "secondword"),
        ),
        "user parts": History([user(parts("userword", "partword"))], ("userword", "partword")),
        "system parts": History(
            [{"role": "system", "content": parts("systemword", "partword")}, user()],
            ("systemword", "partword", "userword"),
        ),
        "assistant parts": History(
            [user(), assistant(parts("answerword", "partword")), user("secondword")],
            ("userword", "answerword", "partword", "secondword"),
        ),
        "part with cache_control": History(
            [user([{"type": "text", "text": "userword", "cache_control": {"type": "ephemeral"}}])],
            ("userword",),
        ),
        "part with an unknown field": History(
            [user([{"type": "text", "text": "userword", "source_lang_code": "langword"}])],
            ("userword", "langword"),
        ),
        "reasoning, earlier turn": History(
            [user(), assistant(reasoning_content="thoughtword"), user("secondword")],
            ("userword", "answerword", "secondword"),
            ("thoughtword",),
        ),
        "reasoning, this turn": History(
            [user(), call(None, reasoning_content="thoughtword"), result()],
            (*CALLED, "resultword"),
            ("thoughtword",),
        ),
        "reasoning in the content": History(
            [user(), assistant("<think>\nthoughtword\n</think>\n\nanswerword"), user("secondword")],
            ("userword", "answerword", "secondword"),
            ("thoughtword",),
        ),
        "user name": History([user() | {"name": "nameword"}], ("userword", "nameword")),
        "unknown field": History([user() | {"mood": "moodword"}], ("userword", "moodword")),
        "unknown variable": History(
            [user()],
            ("userword", "variableword"),
            options={"chat_template_kwargs": {"qzvariable": "variableword"}},
        ),
        "documents": History(
            [user()],
            ("userword", "documentword"),
            options={"documents": [{"title": "t", "text": "documentword"}]},
        ),
        "continue": History([user(), assistant()], ("userword", "answerword"), options=CONTINUE),
        "continue parts": History(
            [user(), assistant(parts("answerword"))], ("userword", "answerword"), options=CONTINUE
        ),
        "continue with reasoning": History(
            [user(), assistant(reasoning_content="thoughtword")],
            ("userword", "answerword"),
            ("thoughtword",),
            CONTINUE,
        ),
        "ends with an answer": History(
            [user(), assistant()], ("userword", "answerword"), options={"add_generation_prompt": False}
        ),
    }


def _without_arguments() -> dict[str, Any]:
    function = {"name": "get_current_weather"}
    return assistant(None, tool_calls=[{"id": "abcdefgh1", "type": "function", "function": function}])
