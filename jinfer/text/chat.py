"""Chat templates: messages become the prompt that the model was trained on, as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from jinfer.errors import ModelError, RequestError
from jinfer.text.files import read_json, special_tokens
from jinfer.text.sandbox import TemplateEnvironment

# A message's reasoning arrives under several names; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What `render` has arguments for.
_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
# Marks where the last message ends. Its trailing space tells whether the template trims what it prints.
_END_MARK = "END_OF_THE_MESSAGE_TO_CONTINUE "


class ChatTemplate:
    """A model's chat template, ready to render.

    Args:
      templates: Jinja source by name; `"default"` is used, or `"tool_use"` where tools are given and it
        exists.
      special_tokens: name (`"bos_token"`) to text; templates print them.
      max_characters: the largest prompt, in characters; a template that makes more is stopped.
      max_seconds: the longest that one rendering may take.

    Raises:
      ModelError: a template is not valid Jinja.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        max_characters: int = 16_000_000,
        max_seconds: float = 2.0,
    ) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._environment = TemplateEnvironment(max_characters, max_seconds)
        self._sources = dict(templates)
        self._compiled: dict[str, jinja2.Template] = {}
        self._takes_parts: dict[str, bool] = {}
        self._reads: dict[str, set[str]] = {}  # the variables that a template looks at
        for name, source in templates.items():
            try:
                self._compiled[name] = self._environment.from_string(source)
                tree = self._environment.parse(source)
                self._takes_parts[name] = _reads_parts(tree)
                self._reads[name] = meta.find_undeclared_variables(tree)
            except jinja2.TemplateSyntaxError as error:
                raise ModelError(
                    f"chat template {name!r} is not valid Jinja (line {error.lineno}: {error.message}): "
                    "mend chat_template.jinja or tokenizer_config.json in the model folder"
                ) from error

    @property
    def sources(self) -> dict[str, str]:
        """The templates as they are written, by name."""
        return dict(self._sources)

    @classmethod
    def from_folder(cls, path: str | Path, **limits: Any) -> "ChatTemplate | None":
        """The chat template of a model folder, None where it has none (a base model).

        Looked for, in this order: `chat_template.jinja` with `additional_chat_templates/`,
        `chat_template.json`, `tokenizer_config.json`. `limits` are `max_characters` and `max_seconds`.
        """
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        templates = _template_files(folder)
        if not templates:
            for source in (read_json(folder / "chat_template.json"), config):
                templates = templates or _named_templates(source.get("chat_template"))
        if not templates:
            return None
        named = {name: token.content for name, token in special_tokens(folder, config).items()}
        return cls(templates, named, **limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation. Encode it with `add_special_tokens=False`: templates write their own.

        Args:
          messages: objects with a `role`; `content` is text, or a list of `{"type": "text", "text": ...}`.
          tools: function schemas as OpenAI clients send them.
          add_generation_prompt: end with the opening of an assistant message.
          continue_final_message: leave the last message open, so that the model goes on with it.
          chat_template_kwargs: further variables for the template, such as `enable_thinking`.
          documents: objects, mostly with `title` and `text`, for templates that show documents to answer from.

        Raises:
          RequestError: messages the template cannot render, tools or documents that it would leave out, or
            chat_template_kwargs with one of the other arguments; `param` names the field.
        """
        if not messages:
            raise RequestError("messages is empty, expected at least one message", "messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first goes on with "
                "the last message, the second opens a new one. Set add_generation_prompt to false",
                "continue_final_message",
            )
        _check_variables(chat_template_kwargs)
        name = self._choose(tools)
        for field, given in (("tools", tools), ("documents", documents)):
            if given and field not in self._reads[name] and (name, field) != ("tool_use", "tools"):
                raise RequestError(
                    f"the model's chat template has no place for {field}, so the model would not see them: leave them "
                    "out, or put them into a message",
                    field,
                )
        chat = [_plain_message(i, message, self._takes_parts[name]) for i, message in enumerate(messages)]
        ending = _mark_end(chat[-1], self._sources[name]) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **_plain(chat_template_kwargs or {}),
            "messages": chat,
            "tools": _plain(list(tools)) if tools else None,
            "documents": _plain(list(documents)) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(name, variables)
        return text if ending is None else _cut_at_mark(text, ending)

    def reads(self, variable: str) -> bool:
        """Whether any of the templates looks at a variable."""
        return any(variable in names for names in self._reads.values())

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools and "tool_use" in self._compiled:
            return "tool_use"
        if "default" in self._compiled:
            return "default"
        if len(self._compiled) == 1:
            return next(iter(self._compiled))
        raise RequestError(f"the model has chat templates {sorted(self._compiled)}, and none is the default")

    def _render(self, name: str, variables: dict[str, Any]) -> str:
        try:
            return self._environment.render(self._compiled[name], variables)
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except RecursionError:
            reason = "it calls itself without end"
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError) as error:
            # A template that meets a field it does not expect fails with whatever Python raises there.
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(
            f"the model's chat template cannot render these messages: {reason}. Check the roles, their order "
            "and the fields of each message",
            "messages",
        )


def _check_variables(variables: Any) -> None:
    if variables is not None and not isinstance(variables, Mapping):
        raise RequestError(
            f"chat_template_kwargs is a {type(variables).__name__}, expected an object of variables",
            "chat_template_kwargs",
        )
    for name in _ARGUMENTS:
        if name in (variables or {}):
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is an argument of its own: give it there",
                "chat_template_kwargs",
            )


def _template_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    try:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"a chat template in {folder} cannot be read: {error}") from error


def _named_templates(value: Any) -> dict[str, str]:
    """Templates from the forms a config writes: one text, or a list of objects with a name and a template."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping):
        value = [{"name": name, "template": template} for name, template in value.items()]
    try:
        templates = {item["name"]: item["template"] for item in value}
    except (TypeError, KeyError):
        templates = None
    if templates is None or not all(isinstance(template, str) for template in templates.values()):
        raise ModelError("chat_template is neither text nor a list of objects with `name` and `template`")
    return templates


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether a template goes through `content` part by part; the others expect it to be one text."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter):
            return node.node is not None and is_content(node.node)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in aliases

    aliases = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            aliases.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _plain(value: Any) -> Any:
    """The value rebuilt of JSON's types only: a template could call any method of another object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump(exclude_none=True))
    raise RequestError(f"a chat holds a {type(value).__name__}, expected JSON values", "messages")


def _plain_message(index: int, message: Any, takes_parts: bool) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
        raise RequestError(f"messages[{index}] is not an object with a role", "messages")
    # Clients send null for what a message does not have; templates test whether a field exists.
    plain = {key: value for key, value in plain.items() if value is not None}
    content = plain.get("content", "")
    if isinstance(content, list):
        plain["content"] = _text_parts(index, content) if takes_parts else _joined(index, content)
    elif not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content is a {type(content).__name__}, expected text or a list of text parts",
            "messages",
        )
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(index, plain["tool_calls"])
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _text_parts(index: int, parts: list[Any]) -> list[dict[str, Any]]:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"messages[{index}].content has a part of type {kind!r}; this model takes text only: "
                'expected {"type": "text", "text": ...}',
                "messages",
            )
    return parts


def _joined(index: int, parts: list[Any]) -> str:
    return "\n".join(part["text"] for part in _text_parts(index, parts))


def _tool_calls(index: int, calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects: clients send them as JSON text, templates print objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"messages[{index}].tool_calls is not a list of objects", "messages")
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise RequestError(
                    f"messages[{index}].tool_calls has arguments that are not JSON ({error})", "messages"
                ) from error
    return calls


def _mark_end(message: dict[str, Any], source: str) -> str:
    """Appends the mark to the message's text, in place; returns the text it had."""
    content = message.get("content")
    if content is None or "content" not in source:
        raise RequestError("continue_final_message: the last message has no content", "messages")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    if not content:
        raise RequestError("continue_final_message: the last message has no text part", "messages")
    text = content[-1]["text"]
    content[-1] = {**content[-1], "text": text + _END_MARK}
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
