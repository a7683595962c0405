"""Chat templates: messages become the prompt that the model was trained on, as transformers renders it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from jinfer.errors import ModelError, RequestError
from jinfer.text.files import read_json, special_tokens
from jinfer.text.rendering import Renderer
from jinfer.text.sandbox import TemplateEnvironment

# What `render` has arguments for.
_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


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
        self._limits = (max_characters, max_seconds)
        self._sources = dict(templates)
        self._renderers: dict[str, Renderer] = {}
        self._reads: dict[str, set[str]] = {}  # the variables that a template looks at
        environment = TemplateEnvironment(max_characters, max_seconds)
        for name, source in templates.items():
            try:
                self._reads[name] = meta.find_undeclared_variables(environment.parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise ModelError(
                    f"chat template {name!r} is not valid Jinja (line {error.lineno}: {error.message}): "
                    "fix chat_template.jinja or tokenizer_config.json in the model folder"
                ) from error
            except RecursionError:
                raise ModelError(
                    f"chat template {name!r} is nested too deeply: fix chat_template.jinja or tokenizer_config.json"
                ) from None

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
        tools_are_optional: bool = False,
    ) -> str:
        """The prompt of a conversation. Encode it with `add_special_tokens=False`: templates write their own.

        Args:
          messages: objects with a `role`; `content` is text, or a list of `{"type": "text", "text": ...}`.
          tools: function schemas as OpenAI clients send them.
          add_generation_prompt: end with the opening of an assistant message.
          continue_final_message: leave the last message open, so that the model goes on with it.
          chat_template_kwargs: further variables for the template, such as `enable_thinking`.
          documents: objects, mostly with `title` and `text`, for templates that show documents to answer from.
          tools_are_optional: the template may leave the tools out: no tool may be called.

        Raises:
          RequestError: messages the template cannot render; anything that it would leave out; or chat_template_kwargs
            with one of the other arguments, or with a name that it does not read. `param` names the field.
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
        if tools and tools_are_optional and not self.shows_tools:
            tools = None
        name = self._choose(tools)
        for field, given in (("tools", tools), ("documents", documents)):
            if given and field not in self._reads[name] and (name, field) != ("tool_use", "tools"):
                raise RequestError(
                    f"the model's chat template has no place for {field}, so the model would not see them: leave them "
                    "out, or put them into a message",
                    field,
                )
        extra = _plain(chat_template_kwargs or {})
        self._check_read(name, extra)
        return self._renderer(name).render(
            {
                "messages": _plain(list(messages)),
                "tools": _plain(list(tools)) if tools else None,
                "documents": _plain(list(documents)) if documents else None,
                "variables": extra,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "tools_are_optional": tools_are_optional,
            }
        )

    @property
    def shows_tools(self) -> bool:
        """Whether there is a template with a place for tools."""
        return "tool_use" in self._sources or self.reads("tools")

    def reads(self, variable: str) -> bool:
        """Whether any of the templates looks at a variable."""
        return any(variable in names for names in self._reads.values())

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" in self._sources:
            return "default"
        if len(self._sources) == 1:
            return next(iter(self._sources))
        raise RequestError(f"the model has chat templates {sorted(self._sources)}, and none is the default")

    def _renderer(self, name: str) -> Renderer:
        if name not in self._renderers:
            self._renderers[name] = Renderer(self._sources[name], self._special_tokens, *self._limits)
        return self._renderers[name]

    def _check_read(self, name: str, variables: dict[str, Any]) -> None:
        for variable, value in variables.items():
            if value is not None and variable not in self._reads[name]:
                raise RequestError(
                    f"chat_template_kwargs has {variable[:100]!r}, which the model's chat template does not read: remove it",
                    "chat_template_kwargs",
                    "unsupported_field",
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
