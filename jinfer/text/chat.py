"""Chat templates: messages become the prompt that the model was trained on, as transformers renders it."""

import itertools
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from jinfer.errors import ModelError, RequestError, RequestFailedError
from jinfer.text.files import read_json, special_tokens
from jinfer.text.plain import plain
from jinfer.text.protected import ProtectedEncoder
from jinfer.text.render_pool import RenderPool, WorkerDied, shared_pool
from jinfer.text.rendering import CANNOT_RENDER
from jinfer.text.sandbox import TemplateEnvironment
from jinfer.text.template_needs import Needs
from jinfer.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# What `render` has arguments for, beside the messages and chat_template_kwargs.
OPTIONS = ("tools", "documents", "add_generation_prompt", "continue_final_message")


_KEYS = itertools.count()  # one for each template, by which the processes know them


class ChatTemplate:
    """A model's chat template, ready to render.

    Args:
      templates: Jinja source by name; `"default"` is used, or `"tool_use"` where tools are given and it
        exists.
      special_tokens: name (`"bos_token"`) to text; templates print them.
      max_characters: the largest prompt, in characters; a template that makes more is stopped.
      max_seconds: the longest that one rendering may take, in CPU time.
      pool: the processes that render; the default are those that every template of this process shares.

    Raises:
      ModelError: a template is not valid Jinja.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        max_characters: int = 16_000_000,
        max_seconds: float = 2.0,
        pool: RenderPool | None = None,
    ) -> None:
        self.special_tokens = dict(special_tokens or {})
        self._limits = {"max_characters": max_characters, "max_seconds": max_seconds}
        self._pool = pool
        self._sources = dict(templates)
        self._needs: dict[str, Any] = {}  # as a process found them out
        self._keys: dict[tuple[str, bool], int] = {}
        self._encoder: tuple[Tokenizer, ProtectedEncoder] | None = None
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
        **options: Any,
    ) -> str:
        """The prompt of a conversation as text; see `tokens`, which keeps what the messages say from becoming special
        tokens."""
        return self._rendered(messages, tools, encoder=None, **options)[0]

    def tokens(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        allow_special_tokens: bool = False,
        max_tokens: int | None = None,
        **options: Any,
    ) -> tuple[list[int], str]:
        """The prompt of a conversation as token ids and as text.

        Args:
          tokenizer: the model's.
          add_special_tokens: put what the tokenizer puts before a text (templates write their own).
          allow_special_tokens: the text of a special token in a message, tool or document becomes that token; else it
            is ordinary text.
          max_tokens: a prompt whose length alone shows that it has more is refused (RequestError) and not encoded.
          options: as of `render`.
        """
        encoder = None if allow_special_tokens else self._guard(tokenizer)
        text, mark = self._rendered(messages, encoder=encoder, **options)
        if max_tokens is not None:
            tokenizer.refuse_long(text if mark is None else text.replace(mark, ""), max_tokens)
        if mark is None:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens), text
        assert encoder is not None
        return encoder.encode(text, mark, add_special_tokens), text.replace(mark, "")

    def prepare(self) -> None:
        """Starts a process that renders, and lets it study the templates: the first request finds both."""
        for name in self._sources:
            try:
                self._ask(name, None, None)
            except RequestError:
                pass  # the first chat says what is wrong with the template
            except RequestFailedError as error:
                logger.warning("%s", error)

    def needs(self, name: str | None = None) -> Needs:
        """What a template needs of messages; of the default one where none is named."""
        name = name or self.choose()
        if name not in self._needs:
            self._ask(name, None, None)
        return Needs.from_json(self._needs[name])

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tools_are_optional: bool = False,
        *,
        encoder: ProtectedEncoder | None = None,
    ) -> tuple[str, str | None]:
        """The prompt as text, and the mark in it.

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
        name = self.choose(tools)
        for field, given in (("tools", tools), ("documents", documents)):
            if given and field not in self._reads[name] and (name, field) != ("tool_use", "tools"):
                raise RequestError(
                    f"the model's chat template has no place for {field}, so the model would not see them: leave them "
                    "out, or put them into a message",
                    field,
                )
        extra = plain(chat_template_kwargs or {}, "chat_template_kwargs")
        self._check_read(name, extra)
        request = {
            "messages": plain(list(messages), "messages"),
            "tools": plain(list(tools), "tools") if tools else None,
            "documents": plain(list(documents), "documents") if documents else None,
            "variables": extra,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools_are_optional": tools_are_optional,
            "allows_special_tokens": encoder is None,
        }
        request["spellings"] = encoder.spellings(request) if encoder is not None else []
        answer = self._ask(name, request, encoder)
        return answer["text"], answer["mark"]

    @property
    def shows_tools(self) -> bool:
        """Whether there is a template with a place for tools."""
        return "tool_use" in self._sources or self.reads("tools")

    def reads(self, variable: str) -> bool:
        """Whether any of the templates looks at a variable."""
        return any(variable in names for names in self._reads.values())

    def source(self, name: str) -> str:
        """The Jinja source of a template."""
        return self._sources[name]

    def choose(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The name of the template that a request with or without tools is rendered by."""
        if tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" in self._sources:
            return "default"
        if len(self._sources) == 1:
            return next(iter(self._sources))
        raise RequestError(f"the model has chat templates {sorted(self._sources)}, and none is the default")

    def _ask(
        self, name: str, request: dict[str, Any] | None, encoder: ProtectedEncoder | None
    ) -> dict[str, Any]:
        """The answer of a process that renders. Raises RequestError."""
        guarded = encoder is not None and bool(encoder.special_texts)
        template = {
            "source": self._sources[name],
            "special_tokens": self.special_tokens,
            **self._limits,
            "needs": self._needs.get(name),
            "guarded": encoder.special_texts if encoder and guarded else [],
            "guard_ignores_case": bool(encoder and encoder.ignores_case),
        }
        key = self._keys.setdefault((name, guarded), next(_KEYS))
        seconds = self._limits["max_seconds"]
        try:
            answer = (self._pool or shared_pool()).ask(key, template, request, seconds)
        except WorkerDied as error:
            late = error.signal in (signal.SIGPROF, signal.SIGXCPU)
            reason = (
                f"it ran longer than {seconds:g} seconds" if late else "the process that renders it was ended"
            )
            answer = {"error": f"{CANNOT_RENDER}: {reason}", "param": "messages", "code": None}
        if "needs" in answer:
            self._needs[name] = answer["needs"]
        if "error" in answer:
            raise RequestError(answer["error"], answer["param"], answer["code"])
        return answer

    def _guard(self, tokenizer: Tokenizer) -> ProtectedEncoder:
        if self._encoder is None or self._encoder[0] is not tokenizer:
            self._encoder = (tokenizer, ProtectedEncoder(tokenizer))
            self._keys = {}
        return self._encoder[1]

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
    for name in ("messages", *OPTIONS):
        if name in (variables or {}):
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is a field of the request",
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
