"""A message means the same whether an optional field is absent, null or empty, and nothing of it is lost.

Each small template here has one need of its own.
"""

from typing import Any

import pytest

from jinfer.errors import RequestError
from jinfer.text.chat import ChatTemplate

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
PLAIN = LOOP % "<{{ m.role }}>{{ m.content }}"
CALLS = (
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
)
NEEDS = {
    "text": LOOP % ("<{{ m.role }}>{{ m.content + '' }}" + CALLS),
    "null": LOOP
    % ("<{{ m.role }}>{% if m.content is not none %}{{ m.content }}{{ '|' }}{% endif %}" + CALLS),
    "absent": LOOP
    % (
        "{% if 'content' in m and m.tool_calls %}{{ raise_exception('both') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}" + CALLS
    ),
    "text arguments": LOOP
    % (
        "<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ' ' + c.function.arguments + ']' }}{% endfor %}"
    ),
    "object arguments": LOOP
    % (
        "<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
        " {{ k }}={{ v }}{% endfor %}]{% endfor %}"
    ),
}
SHOWN = {
    "text": '<user>a<assistant>[f {"x": "y"}]<tool>r',
    "null": '<user>a|<assistant>[f {"x": "y"}]<tool>r|',
    "absent": '<user>a<assistant>[f {"x": "y"}]<tool>r',
    "text arguments": '<user>a<assistant>[f {"x": "y"}]<tool>r',
    "object arguments": "<user>a<assistant>[f x=y]<tool>r",
}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"type": "function", "id": "abcdef123", "function": function}]
    return {"role": "assistant", "tool_calls": calls, **fields}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "abcdef123", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate({"default": source}).render(messages, **options)


def refusal(source: str, messages: list[dict[str, Any]], **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        render(source, messages, **options)
    return caught.value


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("fields", [{"content": None}, {"content": ""}, {}, {"content": []}], ids=str)
@pytest.mark.parametrize("arguments", ['{"x": "y"}', {"x": "y"}], ids=["text", "object"])
def test_a_call_is_shown_in_the_form_that_the_template_needs(name, fields, arguments):
    assert render(NEEDS[name], [user("a"), call(arguments, **fields), result("r")]) == SHOWN[name]


def test_arguments_that_are_text_stay_as_they_are_where_text_is_needed():
    messages = [user("a"), call('{"x":"y" }', content=None), result("r")]
    assert '[f {"x":"y" }]' in render(NEEDS["text arguments"], messages)


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments(arguments):
    assert "[f {}]" in render(NEEDS["text"], [user("a"), call(arguments), result("r")])


ROLES = {
    "own": LOOP % "{% if m.role == 'developer' %}<dev>{% else %}<{{ m.role }}>{% endif %}{{ m.content }}",
    "drops": LOOP
    % "{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}",
    "prints any": PLAIN,
    "refuses": LOOP
    % (
        "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}"
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_developer_becomes_system_where_the_template_has_no_such_role(name):
    shown = render(ROLES[name], [{"role": "developer", "content": "d"}, user("u")])
    assert shown == ("<dev>d<user>u" if name == "own" else "<system>d<user>u")


def test_system_messages_at_the_beginning_are_joined_where_one_is_shown():
    first = (
        "{% if messages[0].role == 'system' %}<s>{{ messages[0].content }}{% endif %}"
        + LOOP % "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}"
    )
    heads = [{"role": "system", "content": "one"}, {"role": "developer", "content": "two"}]
    assert render(first, [*heads, user("u")]) == "<s>one\n\ntwo<user>u"
    assert render(PLAIN, [*heads, user("u")]) == "<system>one<system>two<user>u"
    later = [user("u"), {"role": "system", "content": "a later word"}]
    error = refusal(first, later)
    assert str(error).startswith("messages[1].content would be lost")
    assert (error.param, error.code) == ("messages", "unsupported_field")


ITERATES = LOOP % (
    "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
)
FIRST_PART = LOOP % (
    "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
)
PRINTS = LOOP % "<{{ m.role }}>{{ m.content if m.content is string else m.content | tojson }}"
ONLY_PARTS = LOOP % "<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}"
SOME_ROLES = LOOP % (
    "<{{ m.role }}>{% if m.role == 'user' and m.content is not string %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("source", [PLAIN, ITERATES, FIRST_PART, PRINTS, ONLY_PARTS, SOME_ROLES])
def test_parts_are_one_text_in_every_role(source, role):
    whole = [user("u"), call({}, content=""), {"role": role, "content": parts("one", "two")}, user("v")]
    source = source.replace("{% endfor %}", CALLS + "{% endfor %}") if source == PLAIN else source
    messages = [m for m in whole if not m.get("tool_calls")]
    joined = (
        "onetwo" if source in (ITERATES, ONLY_PARTS) or (source, role) == (SOME_ROLES, "user") else "one\ntwo"
    )
    assert render(source, messages) == f"<user>u<{role}>{joined}<user>v"
    text = [user("u"), {"role": role, "content": "one"}, user("v")]
    assert render(source, text) == f"<user>u<{role}>one<user>v"


def test_empty_fields_are_absent_ones():
    strict = LOOP % (
        "{% for f in ['tool_calls', 'name', 'reasoning_content', 'refusal', 'audio', 'mood'] %}"
        "{% if f in m %}{{ raise_exception(f) }}{% endif %}{% endfor %}<{{ m.role }}>{{ m.content }}"
    )
    empty = {"tool_calls": [], "name": "", "reasoning_content": None, "refusal": None, "audio": None}
    assert (
        render(strict, [user("u", name=None), {"role": "assistant", "content": "a", **empty}])
        == "<user>u<assistant>a"
    )
    assert render(strict, [user("u", prefix=False, details=[], thinking_blocks=[], mood="")]) == "<user>u"


@pytest.mark.parametrize("form", [None, [], "undefined"])
def test_no_tools_take_the_form_that_the_template_needs(form):
    tests = {"None": "tools is none", "undefined": "tools is not defined", "[]": "tools is iterable"}
    test = tests[str(form)]
    source = f"{{% if not ({test}) %}}{{{{ raise_exception('tools') }}}}{{% endif %}}" + PLAIN
    for tools in (None, []):
        assert render(source, [user("u")], tools=tools) == "<user>u"


LOST = {
    "calls": (
        PLAIN,
        [user("u"), call({"x": "y"}, content="beside it"), user("v")],
        "messages[1].tool_calls[0]",
    ),
    "text beside a call": (
        LOOP % ("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}"),
        [user("u"), call({"x": "y"}, content="beside it"), user("v")],
        "messages[1].content",
    ),
    "name": (PLAIN, [user("u", name="Ann")], "messages[0].name"),
    "role": (
        LOOP % "{% if m.role == 'user' %}{{ m.content }}{% endif %}",
        [{"role": "system", "content": "s"}, user("u")],
        "messages[0].content",
    ),
    "reasoning": (
        PLAIN,
        [user("u"), {"role": "assistant", "content": "a", "reasoning_content": "r"}],
        "messages[1].reasoning_content",
    ),
    "a field": (PLAIN, [user("u", mood="calm")], "messages[0].mood"),
    "a field that is read elsewhere": (
        LOOP % "{% if m.role == 'robot' %}{{ m.mood }}{% endif %}{{ m.content }}",
        [user("u", mood="calm")],
        "messages[0].mood",
    ),
    "a part's field": (
        PLAIN,
        [user([{"type": "text", "text": "a", "language": "de"}])],
        "messages[0].content[0].language",
    ),
    "a role": (PLAIN, [{"role": "wizard", "content": "w"}], "messages[0].role"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_refused_by_name(name):
    source, messages, where = LOST[name]
    error = refusal(source, messages)
    assert str(error).startswith(where)
    assert error.param == "messages"


def test_variables_that_no_line_reads_are_refused():
    error = refusal(PLAIN, [user("u")], chat_template_kwargs={"mood": "calm"})
    assert "'mood'" in str(error)
    assert error.param == "chat_template_kwargs"
    assert render(PLAIN, [user("u")], chat_template_kwargs={"mood": None}) == "<user>u"


def test_what_is_harmless_passes():
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    assert render(PLAIN, [user([part], id="msg_1")]) == "<user>a"
    named = result("r", name="f")
    assert render(NEEDS["text"], [user("a"), call({"x": "y"}), named]) == SHOWN["text"]
    assert "would be lost" in str(
        refusal(NEEDS["text"], [user("a"), call({"x": "y"}), result("r", name="g")])
    )


def test_reasoning_goes_where_the_template_reads_it():
    keeps = LOOP % "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
    for name in ("reasoning_content", "reasoning", "thinking"):
        answer = {"role": "assistant", "content": "a", name: "r"}
        assert render(keeps, [user("u"), answer]) == "u(r)a"
    last = (
        LOOP
        % "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    )
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert render(last, [user("u"), answer]) == "u(r)a"
    assert render(last, [user("u"), answer, user("v")]) == "uav"  # its habit with earlier turns
    cuts = LOOP % "{{ m.content.split('</think>')[-1] }}"
    assert render(cuts, [user("u"), answer, user("v")]) == "uav"
    block = LOOP % (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ '(' ~ p.thinking ~ ')' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}"
    )
    assert render(block, [user("u"), answer]) == "u(r)a"
    own = {"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, *parts("a")]}
    assert render(block, [user("u"), own]) == "u(r)a"


def test_roles_and_fields_that_a_template_reads_are_passed_on():
    source = LOOP % (
        "{% if m.role == 'critic' %}<critic>{% endif %}{{ m.content }}{% if m.mood %}({{ m.mood }}){% endif %}"
    )
    assert (
        render(source, [user("u"), {"role": "critic", "content": "c", "mood": "grim"}]) == "u<critic>c(grim)"
    )


def test_a_result_gets_its_name_where_the_template_fails_without():
    source = LOOP % (
        "<{{ m.role }}>{% if m.role == 'tool' %}{{ m.name + ':' }}{% endif %}{{ m.content }}" + CALLS
    )
    assert (
        render(source, [user("a"), call({"x": "y"}), result("r")])
        == '<user>a<assistant>[f {"x": "y"}]<tool>f:r'
    )


def test_tools_that_may_not_be_called_are_left_out_where_there_is_no_place():
    tools = [{"type": "function", "function": {"name": "f", "description": "d"}}]
    assert render(PLAIN, [user("u")], tools=tools, tools_are_optional=True) == "<user>u"
    assert refusal(PLAIN, [user("u")], tools=tools).param == "tools"
    fails = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + PLAIN
    assert render(fails, [user("u")], tools=tools, tools_are_optional=True) == "<user>u"
    assert "no tools here" in str(refusal(fails, [user("u")], tools=tools))


def test_deeply_nested_arguments_are_refused():
    error = refusal(NEEDS["text"], [user("a"), call("[" * 100_000), result("r")])
    assert "nested too deeply" in str(error)


def test_many_messages_cost_one_pass():
    template = ChatTemplate({"default": PLAIN})
    pairs = [user("hi there"), {"role": "assistant", "content": "hello"}]
    assert len(template.render(pairs * 10_000)) > 200_000  # within the template's two seconds
    cuts = ChatTemplate({"default": LOOP % "{{ m.content.split('</think>')[-1] }}"})
    thought = {"role": "assistant", "content": "hello", "reasoning_content": "a long thought about it"}
    assert len(cuts.render([user("hi there"), thought] * 5_000)) == 65_000
