"""The command that tries templates: what it calls equal, mapped, refused, dropped and different."""

import json

import pytest

from jinfer.text import ChatTemplate
from tools.check_template.__main__ import main
from tools.check_template.check import check
from tools.check_template.histories import histories

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content + '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
)


def outcomes(template):
    return {cell.history: cell for cell in check("t", template)}


def test_equal_mapped_refused():
    cells = outcomes(ChatTemplate({"default": PLAIN}))
    assert {cell.outcome for cell in cells.values()} == {"equal", "mapped", "refused"}
    assert cells.keys() == histories().keys()
    assert (cells["user"].outcome, cells["continue"].outcome) == ("equal", "equal")
    assert (cells["developer"].outcome, cells["developer"].detail) == ("mapped", "developer -> system")
    assert cells["user parts"].detail == "content parts -> text"
    assert cells["tools"].outcome == "refused"
    assert "no place for tools" in cells["tools"].detail
    assert cells["call, content null"].detail.startswith("messages[1].tool_calls[0] would be lost")
    cells = outcomes(ChatTemplate({"default": CALLS}))
    assert "content null -> empty" in cells["call, content null"].detail
    assert cells["call and tools"].outcome == "mapped"
    assert cells["tools"].outcome == "equal"


@pytest.mark.parametrize(("made", "outcome"), [("", "dropped"), ("userword!", "differs")])
def test_what_a_wrong_renderer_shows(made, outcome):
    class Wrong(ChatTemplate):
        def render(self, *args, **kwargs):
            return made

    assert outcomes(Wrong({"default": PLAIN}))["user"].outcome == outcome


def test_the_command(tmp_path, capsys, monkeypatch):
    good, other = tmp_path / "good.jinja", tmp_path / "other.jinja"
    good.write_text(PLAIN)
    other.write_text(CALLS)
    assert main([str(good), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "good: " in shown
    assert f"2 templates, {2 * len(histories())} histories: " in shown
    assert main(["--json", str(good)]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert cells[0] == {"template": "good", "history": "user", "outcome": "equal", "detail": ""}
    monkeypatch.setattr(ChatTemplate, "render", lambda *args, **kwargs: "")
    assert main([str(good)]) == 1
    assert "dropped" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jinja")]) == 2
    good.write_text("{% if %}")
    assert main([str(good)]) == 2
    assert "not valid Jinja" in capsys.readouterr().err
