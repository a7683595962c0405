"""Chat templates render what transformers renders, within limits, and refuse what they cannot render."""

import json
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jinfer.errors import ModelError, RequestError
from jinfer.text.chat import ChatTemplate

# Written in the manner of these families' templates.
TEMPLATES = {file.stem: file.read_text() for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string", "enum": ["<ö>"]}}},
    },
}
TURNS = [
    {"role": "user", "content": " Hi, what's <2> & 3? "},
    {"role": "assistant", "content": "It's 5. "},
    {"role": "user", "content": "größer\n日本 😀"},
]
SYSTEM = [{"role": "system", "content": "Be kind.\n"}, *TURNS]
TOOLS = [
    *SYSTEM,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "<ö>"}}}],
    },
    {"role": "tool", "content": "21 °C"},
]
ANSWERED = [
    *TURNS,
    {"role": "assistant", "content": "So it is", "reasoning_content": "hm", "tool_calls": None},
]


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    """For each template, ours and transformers' tokenizer that carries it."""
    made = {}
    for name, source in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((folders["byte_level"] / file).read_bytes())
        (folder / "chat_template.jinja").write_text(source)
        made[name] = (ChatTemplate.from_folder(folder), AutoTokenizer.from_pretrained(folder))
    return made


def both(pair, messages, chat_template_kwargs=None, **options):
    ours, theirs = pair
    expected = theirs.apply_chat_template(messages, tokenize=False, **options, **(chat_template_kwargs or {}))
    return ours.render(messages, chat_template_kwargs=chat_template_kwargs, **options), expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        *((name, TURNS, None) for name in TEMPLATES),
        *((name, ANSWERED, None) for name in ("qwen", "qwen3", "deepseek")),
        *((name, SYSTEM, None) for name in TEMPLATES if name != "mistral"),
        *((name, TOOLS, [WEATHER]) for name in ("llama3", "qwen")),
    ],
)
def test_renders_like_transformers(pairs, name, messages, tools, add_generation_prompt):
    ours, theirs = both(pairs[name], messages, tools=tools, add_generation_prompt=add_generation_prompt)
    assert ours == theirs


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ending", ["So it is", "So it is: ", "\nSo"])
def test_continues_the_final_message_like_transformers(pairs, name, ending):
    messages = [*TURNS, {"role": "assistant", "content": ending}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours, theirs = both(pairs[name], messages, **options)
    assert ours == theirs
    assert ours.endswith((ending, ending.strip()))


def test_continues_the_last_text_part(pairs):
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    ours, theirs = both(pairs["gemma"], messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs


def test_template_variables_act(pairs):
    ours, theirs = both(pairs["qwen"], TURNS, {"enable_thinking": False}, add_generation_prompt=True)
    assert ours == theirs
    assert ours.endswith("</think>\n\n")


def test_messages_are_not_changed(pairs):
    messages = [{"role": "user", "content": "x", "name": None}]
    pairs["qwen"][0].render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == [{"role": "user", "content": "x", "name": None}]


def test_text_parts_are_joined_where_the_template_wants_text(pairs):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "a\nb"}]
    for name in ("llama3", "qwen", "mistral"):
        assert pairs[name][0].render(parts) == pairs[name][0].render(joined)
    ours, theirs = both(pairs["gemma"], parts, add_generation_prompt=True)
    assert ours == theirs


def test_tool_arguments_may_be_json_text(pairs):
    as_text = json.loads(json.dumps(TOOLS))
    as_text[-2]["tool_calls"][0]["function"]["arguments"] = '{"city": "<ö>"}'
    assert pairs["llama3"][0].render(as_text) == pairs["llama3"][0].render(TOOLS)
    as_text[-2]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(
        RequestError, match=r"messages\[4\].tool_calls\[0\].function has arguments that are not JSON"
    ):
        pairs["llama3"][0].render(as_text)


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([], {}, "messages is empty"),
        (["hi"], {}, r"messages\[0\] is not an object with a role"),
        ([{"content": "hi"}], {}, r"messages\[0\] is not an object with a role"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content is a number"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "part of type 'image_url'"),
        ([{"role": "user", "content": {1, 2}}], {}, "holds a set"),
        ([{"role": "user", "content": "x", "tool_calls": {}}], {}, "tool_calls is not a list"),
        ([{"role": "system", "content": "x"}], {}, "roles must alternate"),
        ([{"role": "user"}], {}, "content is missing"),
        (TURNS, {"continue_final_message": True}, "exclude each other"),
        (
            [{"role": "user"}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "content is missing",
        ),
    ],
)
def test_bad_messages_are_refused(pairs, messages, options, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        pairs["mistral"][0].render(messages, **options)
    assert caught.value.param in ("messages", "continue_final_message")


@pytest.mark.parametrize("given", [[1], "x", {"messages": []}, {"add_generation_prompt": False}])
def test_variables_that_are_none_are_refused(pairs, given):
    with pytest.raises(RequestError, match="chat_template_kwargs (is a|has)") as caught:
        pairs["mistral"][0].render(TURNS, chat_template_kwargs=given)
    assert caught.value.param == "chat_template_kwargs"


def test_continuing_what_the_template_drops_is_refused():
    template = ChatTemplate(
        {"default": "{% for m in messages if m.content == 'x' %}{{ m.content }}{% endfor %}"}
    )
    with pytest.raises(RequestError, match="leaves out or changes the last message"):
        template.render(
            [{"role": "user", "content": "y"}], add_generation_prompt=False, continue_final_message=True
        )


def found(folder) -> ChatTemplate:
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    return template


def test_templates_are_found_in_order(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    message = [{"role": "user", "content": "x"}]
    config: dict = {
        "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = found(tmp_path)
    assert (template.render(message), template.render(message, [WEATHER])) == ("d", "t")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j{% if tools %}{% endif %}"}))
    assert found(tmp_path).render(message, [WEATHER]) == "j"
    (tmp_path / "chat_template.jinja").write_text("f{{ bos_token }}{% if tools %}{% endif %}")
    config["bos_token"] = {"content": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert found(tmp_path).render(message, [WEATHER]) == "f<s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("a")
    assert found(tmp_path).render(message, [WEATHER]) == "a"


def test_broken_templates_are_named(tmp_path):
    with pytest.raises(ModelError, match="'default' is not valid Jinja .line 2"):
        ChatTemplate({"default": "\n{% if %}"})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "x"}]}')
    with pytest.raises(ModelError, match="neither text nor a list"):
        ChatTemplate.from_folder(tmp_path)


FOREVER = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "callers": (
        "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call twice() %}" * 40
        + "{% endcall %}" * 40
    ),
}


@pytest.mark.parametrize("source", FOREVER.values(), ids=FOREVER)
def test_a_template_that_runs_for_ever_is_stopped(source):
    template = ChatTemplate({"default": source}, max_seconds=0.2)
    start = time.monotonic()
    with pytest.raises(RequestError, match="ran longer than 0.2 seconds"):
        template.render(TURNS)
    assert time.monotonic() - start < 2


DOUBLING = "{%% set ns = namespace(v=%s) %%}{%% for i in range(60) %%}{%% set ns.v = %s %%}{%% endfor %%}"
HUGE = {
    "output": "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "concatenation": DOUBLING % ("'xx'", "ns.v ~ ns.v"),
    "concatenation in a call": DOUBLING % ("'xx'", "(ns.v ~ ns.v) | trim"),
    "addition": DOUBLING % ("'xx'", "ns.v + ns.v"),
    "lists": DOUBLING % ("[1, 2]", "ns.v + ns.v"),
    "product": "{{ 'x' * 99999999999 }}",
    "product from the left": "{{ 99999999999 * [1] }}",
    "replace": DOUBLING % ("'xx'", "ns.v.replace('x', ns.v)"),
    "replace filter": DOUBLING % ("'xx'", "ns.v | replace('x', ns.v)"),
    "join": "{% set s = 'x' * 90000 %}{{ s.join(range(90000) | list) }}",
    "join filter": "{% set s = 'x' * 90000 %}{{ ([s] * 90000) | join }}",
    "map": "{{ ['x'] | map('center', 99999999999) | list }}",
    "ljust": "{{ 'x'.ljust(99999999999) }}",
    "indent": "{{ 'x\nx' | indent(99999999999) }}",
    "tojson": "{{ [1] | tojson(indent=99999999999) }}",
    "format width": "{{ '{:>99999999999}'.format(1) }}",
    "format argument": "{{ '{:>{}}'.format(1, 99999999999) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "percent filter": "{{ '%99999999999d' | format(1) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
}


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_fills_the_memory_is_stopped(source):
    with pytest.raises(RequestError, match="makes a text or list of more than|switched off|to a width"):
        ChatTemplate({"default": source}, max_characters=100_000, max_seconds=5).render(TURNS)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_shows_nothing_of_python(source):
    try:
        shown = ChatTemplate({"default": source}).render(TURNS)
    except RequestError:
        return
    assert shown == ""


def test_limits_do_not_leak_into_the_next_rendering():
    template = ChatTemplate({"default": "{% for i in range(n) %}{% endfor %}done"}, max_seconds=0.2)
    assert template.render(TURNS, chat_template_kwargs={"n": 10}) == "done"
    time.sleep(0.3)
    assert template.render(TURNS, chat_template_kwargs={"n": 10}) == "done"
