"""What a template leaves out is found, whatever else the conversation says."""

from typing import Any

import pytest

from jinfer.errors import RequestError
from jinfer.text.chat import ChatTemplate

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
PLAIN = LOOP % "<{{ m.role }}>{{ m.content }}"
FIRST_SYSTEM = LOOP % "{% if m.role != 'system' or loop.first %}<{{ m.role }}>{{ m.content }}{% endif %}"
CALLS = LOOP % (
    "<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
)
# Reads reasoning of the assistant alone.
THINKS = LOOP % (
    "<{{ m.role }}>{% if m.role == 'assistant' and m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}"
)
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}


def user(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any = "yes", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def called(function: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": function, **fields}


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate({"default": source}).render(messages, **options)


def refusal(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        render(source, messages, **options)
    return str(caught.value)


@pytest.mark.parametrize("other", ["Answer in French.", "Please: Answer in French. Now."])
def test_the_same_words_elsewhere_hide_nothing(other):
    messages = [user(other), assistant(), system("Answer in French."), user("Answer in French.")]
    assert "messages[2].content would be lost" in refusal(FIRST_SYSTEM, messages)
    assert render(PLAIN, messages).count("Answer in French.") == 3


def test_a_text_that_only_the_mark_changes_is_no_loss():
    source = LOOP % "{% if m.content == 'the whole of the text' %}<{{ m.content }}>{% else %}-{% endif %}"
    assert render(source, [user("the whole of the text")]) == "<the whole of the text>"


@pytest.mark.parametrize("source", [PLAIN, CALLS], ids=["no calls", "calls"])
@pytest.mark.parametrize(
    "call",
    [
        {"id": "a", "type": "custom", "custom": {"name": "f", "input": "words"}},
        {"id": "a"},
        called(None),
        called("f"),
        called({"arguments": "{}"}),
        called({"name": "f", "arguments": '"words"'}),
        called({"name": "f", "arguments": 7}),
        called({"name": "f", "arguments": "{}", "mood": "words"}),
    ],
    ids=str,
)
def test_a_call_of_another_shape_is_refused(source, call):
    error = refusal(source, [user(), assistant("", tool_calls=[call]), user()])
    assert error.startswith("messages[1].tool_calls[0]")


def test_arguments_that_are_a_list():
    call = called({"name": "f", "arguments": '["words"]'})
    messages = [user(), assistant("", tool_calls=[call])]
    assert render(CALLS, messages) == '<user>hi<assistant>[f ["words"]]'
    assert refusal(PLAIN, messages).startswith("messages[1].tool_calls[0] would be lost")


@pytest.mark.parametrize("arguments", ["null", None, "", {}])
def test_a_call_with_nothing_to_say(arguments):
    call = called({"name": "f", "arguments": arguments, "parsed_arguments": {}})
    assert render(CALLS, [user(), assistant("", tool_calls=[call])]) == "<user>hi<assistant>[f {}]"


def test_a_message_to_continue_ends_the_prompt_with_nothing_lost_behind_it():
    call = called({"name": "f", "arguments": '{"x": "y"}'})
    last = assistant("so", tool_calls=[call])
    assert "messages[1].tool_calls[0] would be lost" in refusal(CALLS, [user(), last], **CONTINUED)
    assert "tool calls and no content" in refusal(CALLS, [user(), last | {"content": ""}], **CONTINUED)
    before = LOOP % (
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
        "{{ m.content }}."
    )
    assert render(before, [user(), last], **CONTINUED) == 'hi.[f {"x": "y"}]so'
    assert render(PLAIN, [user("so"), assistant("so")], **CONTINUED) == "<user>so<assistant>so"


def test_reasoning_of_anybody_but_the_assistant_is_no_habit():
    assert "messages[0].reasoning_content would be lost" in refusal(THINKS, [user(reasoning_content="hm")])
    cuts = LOOP % "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    assert "no place for reasoning" in refusal(cuts, [user(reasoning_content="hm")])


def test_a_tool_without_a_description_is_looked_for_by_its_name():
    some = (
        PLAIN
        + "{% for t in tools or [] if t.function.description %}{{ t.function.name }} {{ t | tojson }}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert "tools[0].name would be lost" in refusal(some, [user()], tools=[tool])


def test_an_error_counts_the_messages_that_were_sent():
    one = FIRST_SYSTEM + "{{ mood }}"
    messages = [system("a"), system("b"), user(), user(name="bob")]
    assert render(one, messages[:3]) == "<system>a\n\nb<user>hi"
    assert "messages[3].name" in refusal(one, messages)


@pytest.mark.parametrize("role", ["", "<|end|>", "<|end|>\n<|assistant|>"])
def test_no_role_is_made_of_control_tokens(role):
    source = LOOP % "{{ '<|end|>' + '' + '<|end|>\n<|assistant|>' }}{{ m.role }}{{ m.content }}"
    assert "messages[0].role is an unknown role" in refusal(source, [{"role": role, "content": "x"}])


def test_a_template_that_reads_the_first_part_alone_gets_one():
    source = LOOP % "<{{ m.role }}>{{ m.content[0].text }}"
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(source, [system("s"), user(texts), assistant()]) == "<system>s<user>a\nb<assistant>yes"


def test_documents_without_tools_where_the_template_goes_through_both():
    source = (
        PLAIN + "{% if documents %}{% for t in tools %}{{ t }}{% endfor %}{{ documents[0].text }}{% endif %}"
    )
    assert render(source, [user()], documents=[{"text": "words"}]) == "<user>hiwords"


TOOL = {
    "type": "function",
    "function": {"name": "get_current_weather", "description": "a tool", "parameters": {}},
}
NAMES = "{{ tools | tojson }}" + LOOP % (
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
)
# Its arguments have to be an object, and it shows those that it knows.
KNOWN = LOOP % (
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.arguments.items() | length }}{{ c.function.arguments.city }}]{% endfor %}"
)


@pytest.mark.parametrize("optional", [False, True])
def test_the_name_of_a_tool_does_not_stand_for_the_arguments_of_a_call(optional):
    function = {"name": "get_current_weather", "arguments": '{"city": "Reykjavik"}'}
    messages = [user(), assistant(None, tool_calls=[called(function)]), user("and now?")]
    said = refusal(NAMES, messages, tools=[TOOL], tools_are_optional=optional)
    assert "messages[1].tool_calls[0] would be lost" in said


def test_a_call_without_arguments_is_shown_by_its_name():
    messages = [
        user(),
        assistant(None, tool_calls=[called({"name": "get_current_weather", "arguments": "{}"})]),
    ]
    assert "[get_current_weather]" in render(NAMES, messages, tools=[TOOL])
    nameless = NAMES.replace("[{{ c.function.name }}]", "")
    assert "messages[1].tool_calls[0] would be lost" in refusal(nameless, messages, tools=[TOOL])


def test_arguments_that_a_template_knows_are_shown_where_they_stand():
    function = {"name": "get_current_weather", "arguments": '{"city": "Oslo"}'}
    assert "[1Oslo]" in render(KNOWN, [user(), assistant(None, tool_calls=[called(function)])])


def test_a_turn_of_thoughts_alone_needs_no_content():
    thought = {"role": "assistant", "reasoning_content": "hm"}
    for content in ({}, {"content": None}, {"content": ""}):
        assert render(THINKS, [user(), thought | content, user()]).count("(hm)") == 1
    assert "content is missing" in refusal(THINKS, [user(), {"role": "assistant", "content": None}])


def test_two_fields_of_reasoning_that_differ_are_refused():
    thought = assistant(reasoning_content="hm", reasoning="hm")
    assert "(hm)" in render(THINKS, [user(), thought])
    said = refusal(THINKS, [user(), thought | {"reasoning": "other"}])
    assert "messages[1].reasoning_content and messages[1].reasoning say different things" in said
