"""Templates with what the families' templates use: loops over tools, namespaces, macros, the clock, documents.

Each is rendered by jinfer and by transformers, every conversation with every option; where one refuses, so does the
other, and in the template's own words.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from jinfer.errors import RequestError
from jinfer.text.chat import ChatTemplate

FOLDER = Path(__file__).parent / "templates"
NAMES = ["deepseek", "gemma3", "glm4", "gpt_oss", "granite", "llama31", "mistral_tools", "qwen3", "smollm3"]

NO_CALLS = ("gemma3", "granite", "smollm3")  # they show no calls of earlier turns

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wie ist das Wetter? <ö> & 'x'",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "a city"},
                "unit": {"type": "string", "enum": ["°C", "F"], "default": "°C"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": [1, 2]},
                "where": {
                    "oneOf": [
                        {
                            "type": "object",
                            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                        },
                        {"type": ["string", "null"], "description": "by name"},
                    ]
                },
            },
            "required": ["city"],
        },
    },
}
BARE = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
DOCUMENTS = [
    {"doc_id": 1, "title": "One", "text": "Eins ist 1."},
    {"doc_id": "b", "title": "Zwei", "text": ""},
]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, arguments: Any, content: str = "", number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    calls = [{"type": "function", "id": f"abcdef12{i}", "function": function} for i in range(number)]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abcdef120"}


SYSTEM = {"role": "system", "content": " Be kind. /no_think"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt's <5>. "}
REASONED = {"role": "assistant", "content": "So it is.", "reasoning_content": "\nhm "}
CHATS = {
    "one question": [user(" Hi, what's <2> & 3? ")],
    "history": [user("a"), THOUGHT, user("größer\n日本 😀")],
    "system": [SYSTEM, user("a"), {"role": "assistant", "content": "b"}, user("c")],
    "two systems": [SYSTEM, user("a"), {"role": "assistant", "content": "b"}, SYSTEM, user("c")],
    "an answer at the end": [user("a"), THOUGHT],
    "a reasoned answer": [user("a"), REASONED],
    "a call": [user("a"), call("weather", {"unit": "F", "city": "<ö>", "days": [1]}), result('{"t": 21}')],
    "a call and its answer": [SYSTEM, user("a"), call("now", {}, "let me see"), result("noon"), REASONED],
    "two calls": [user("a"), call("now", {}, "x", 2), result("1"), result("2"), user("and then?")],
    "a call with a thought": [user("a"), call("now", {}) | {"reasoning_content": "hm"}, result("noon")],
    "a result without a call": [user("a"), result("noon")],
    "two questions": [user("a"), user("b")],
    "only a system": [SYSTEM],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "thinking off": {"enable_thinking": False},
    "thinking on": {"enable_thinking": True, "thinking": True, "effort": "high"},
    "variables": {
        "date_string": "1 May 2031",
        "builtin_tools": ["hidden", "now", "search"],
        "python_tools": [{"a": 1}, "b"],
        "controls": {"citations": True},
        "identity": "Ich bin's.",
    },
}


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    """For each template, ours and transformers' tokenizer that carries it."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((folders["byte_level"] / file).read_bytes())
        (folder / "chat_template.jinja").write_text((FOLDER / f"{name}.jinja").read_text())
        made[name] = (ChatTemplate.from_folder(folder), AutoTokenizer.from_pretrained(folder))
    return made


def outcomes(pair, messages, variables, **options):
    """What ours and transformers' make of it: the text, or the words of the refusal."""
    ours, theirs = pair
    variables = {name: value for name, value in variables.items() if ours.reads(name)}  # others are refused
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options, **variables)
    except jinja2.TemplateError as error:
        expected = error
    except (TypeError, ValueError, IndexError) as error:
        expected = error
    try:
        return ours.render(messages, chat_template_kwargs=variables, **options), expected
    except RequestError as error:
        return error, expected


def check(pair, messages, variables, **options) -> bool:
    """True if it rendered, and not if both refuse."""
    ours, theirs = outcomes(pair, messages, variables, **options)
    if isinstance(theirs, Exception):
        assert isinstance(ours, RequestError), f"transformers says {theirs!r}"
        assert str(theirs) in str(ours) or ours.code == "unsupported_field"
        return False
    if isinstance(ours, RequestError) and ours.code == "unsupported_field":
        # transformers leaves it out without a word.
        texts = [str(m.get("content")) for m in messages] + ["hm", "now", "weather"]
        assert any(theirs.count(text) < texts.count(text) for text in texts), ours
        return False
    assert ours == theirs
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_conversation_with_every_option(pairs, name):
    rendered = 0
    for messages in CHATS.values():
        for variables in OPTIONS.values():
            for opens in (True, False):
                rendered += check(pairs[name], messages, variables, add_generation_prompt=opens)
    assert rendered >= len(CHATS) * len(OPTIONS) * 0.75  # of two each: the rest is refused by both, or lost


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("deepseek", "gemma3")])
@pytest.mark.parametrize("tools", [[WEATHER], [BARE, WEATHER]], ids=["one", "two"])
def test_tools(pairs, name, tools):
    rendered = 0
    for messages in CHATS.values():
        for variables in (OPTIONS["plain"], OPTIONS["variables"]):
            rendered += check(pairs[name], messages, variables, tools=tools, add_generation_prompt=True)
    assert rendered >= len(CHATS) - 1
    text = pairs[name][0].render(CHATS["one question"], tools=tools)
    assert "weather" in text
    assert "Wie ist das Wetter? <ö> & 'x'" in text


def test_documents(pairs):
    for messages in (CHATS["one question"], CHATS["system"]):
        for tools in (None, [WEATHER]):
            for variables in OPTIONS.values():
                options = {"tools": tools, "documents": DOCUMENTS, "add_generation_prompt": True}
                assert check(pairs["granite"], messages, variables, **options)
    text = pairs["granite"][0].render(CHATS["one question"], documents=DOCUMENTS)
    assert "<role>document b</role>" in text
    assert "Use the documents." in text


@pytest.mark.parametrize("name", ["glm4", "gemma3"])
def test_text_in_parts(pairs, name):
    messages = [user([{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])]
    assert check(pairs[name], messages, {}, add_generation_prompt=True)


def test_continuing_an_answer(pairs):
    for name in ("qwen3", "gemma3", "llama31", "smollm3"):
        messages = [user("a"), {"role": "assistant", "content": "So it is: "}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert check(pairs[name], messages, {}, **options)


def test_arguments_as_json_text_are_those_of_an_object(pairs):
    for name in NAMES:
        if name in NO_CALLS:
            continue
        chat = json.loads(json.dumps(CHATS["a call"]))
        function = chat[1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
        assert pairs[name][0].render(chat) == pairs[name][0].render(CHATS["a call"])


def test_what_a_template_would_leave_out_is_refused(pairs):
    chat = CHATS["one question"]
    with pytest.raises(RequestError, match="no place for tools") as caught:
        pairs["gemma3"][0].render(chat, tools=[WEATHER])
    assert caught.value.param == "tools"
    with pytest.raises(RequestError, match="no place for documents") as caught:
        pairs["qwen3"][0].render(chat, documents=DOCUMENTS)
    assert caught.value.param == "documents"
    assert pairs["gemma3"][0].render(chat, tools=[], documents=[]) == pairs["gemma3"][0].render(chat)


@pytest.mark.parametrize(
    "source",
    [
        "{% if custom is defined %}{% set tools = custom %}{% endif %}{% if tools is defined %}{{ tools }}{% endif %}",
        "{% if tools is not defined %}{% set tools = none %}{% endif %}{{ tools }}",
        "{% macro show() %}{% if not tools %}{% set tools = [] %}{% endif %}{{ tools }}{% endmacro %}{{ show() }}",
        "{% macro show(tools) %}{{ tools }}{% endmacro %}{{ show(tools) }}",
        "{% set ns = namespace(t=tools) %}{{ ns.t }}",
        "{% set tools = tools or [] %}{{ tools }}",
    ],
)
def test_templates_that_keep_tools_under_their_own_name_have_a_place_for_them(source):
    assert "weather" in ChatTemplate({"default": source}).render(CHATS["one question"], tools=[WEATHER])


def test_a_parameter_of_that_name_is_no_place():
    source = "{% macro show(tools) %}{{ tools }}{% endmacro %}{{ show(messages) }}"
    with pytest.raises(RequestError, match="no place for tools"):
        ChatTemplate({"default": source}).render(CHATS["one question"], tools=[WEATHER])
