"""Jinja for the chat templates that model authors write: a sandbox with limits on time and size.

Jinja's own sandbox keeps a template out of Python's internals; it does not keep it from looping for ever or
from filling the memory. Here every loop pass and every macro looks at a deadline, and the operations that can
make a value much larger than what they are given are measured before they run.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Filters and methods whose result can be far larger than what they are given.
_AMPLIFIERS = frozenset(
    {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"}
    | {"slice", "tojson", "wordwrap", "zfill"}
)
_LONG_NUMBER = re.compile(r"\d{5}")
_TICK = "_tick"
_CONCATENATE = "_concatenate"


class TemplateLimitError(SecurityError):
    """A template ran too long or made a value too large."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Renders chat templates to the text transformers renders, within limits.

    Args:
      max_characters: of any text, list or dict that a template makes, and of its output.
      max_seconds: of one rendering.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_characters: int, max_seconds: float) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.max_characters = max_characters
        self.max_seconds = max_seconds
        self._running = threading.local()
        self.filters["tojson"] = self._to_json
        for name in _AMPLIFIERS & self.filters.keys():
            self.filters[name] = self._measured(name, self.filters[name])
        self.filters[_TICK] = jinja2.pass_context(lambda context, value: self._tick())
        self.filters[_CONCATENATE] = self._concatenate
        del self.globals["lipsum"]
        self.globals.update(
            dict=_Dict(),
            namespace=_Namespace,
            raise_exception=_raise_exception,
            strftime_now=lambda format: datetime.now().strftime(format),
        )

    def render(
        self, template: jinja2.Template, variables: dict[str, Any], max_seconds: float | None = None
    ) -> str:
        """The output of a template made by this environment, in `max_seconds` at most if that is less than its own.

        Raises:
          TemplateLimitError: a limit was passed.
          jinja2.TemplateError: whatever else the template does wrong, or raises on purpose.
        """
        parts: list[str] = []
        size = 0
        with self._deadline(min(self.max_seconds, max_seconds or self.max_seconds)):
            for part in template.generate(variables):
                size += len(part)
                self._check_size(size)
                parts.append(part)
        return "".join(parts)

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        # Of this thread's own time: a busy machine is no fault of the template's.
        self._running.deadline = time.thread_time() + seconds
        try:
            yield
        finally:
            del self._running.deadline

    def _tick(self) -> str:
        deadline = getattr(self._running, "deadline", None)
        if deadline is not None and time.thread_time() > deadline:
            raise TemplateLimitError(f"it ran longer than {self.max_seconds:g} seconds")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Jinja's syntax tree, with a tick in every loop and macro, and `~` measured."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            tick = _filter(nodes.Const(""), _TICK, [], node.lineno)
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        # The innermost first: an outer one copies its operands.
        for parent in reversed(list(tree.find_all(nodes.Node))):
            _replace_concatenations(parent)
        return tree.set_environment(self)  # pyright: ignore[reportReturnType]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateLimitError("it uses the operator **, which is switched off")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int):
                    self._check_size(len(value) * times)
        if operator == "%" and isinstance(left, str):
            self._check_amplifier("format", left, (right,))
        result = super().call_binop(context, operator, left, right)
        self._check_size(_size(result))
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(__obj, "__name__", None)
        if name in _AMPLIFIERS:
            # str.format arrives wrapped by Jinja's sandbox.
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            __self._check_amplifier(name, owner, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        __self._check_size(_size(result))
        return result

    def _measured(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        passed = hasattr(filter, "jinja_pass_arg")  # Jinja hands it its context first

        def measured(*args: Any, **kwargs: Any) -> Any:
            value, *given = args[1:] if passed else args
            self._check_amplifier(name, *_as_method(name, value, (*given, *kwargs.values())))
            result = filter(*args, **kwargs)
            self._check_size(_size(result))
            return result

        measured.__dict__.update(filter.__dict__)
        return measured

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON. Jinja's own filter escapes HTML, which a prompt must not.

        With an indent or separators the text can be far larger than the value: it is counted piece by piece.
        """
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None and separators is None:
            return encoder.encode(value)
        parts, size = [], 0
        for part in encoder.iterencode(value):
            size += len(part)
            self._check_size(size)
            parts.append(part)
        return "".join(parts)

    def _check_amplifier(self, name: str, owner: Any, given: tuple[Any, ...]) -> None:
        for value in given:
            if isinstance(value, int):
                self._check_size(value)
        if name in ("format", "format_map") and isinstance(owner, str) and _LONG_NUMBER.search(owner):
            # A width inside the format itself.
            raise TemplateLimitError("it formats text to a width over 9999")
        if name == "replace" and isinstance(owner, str) and len(given) >= 2:
            old, new = str(given[0]), str(given[1])
            if len(new) > len(old):
                self._check_size(len(owner) + owner.count(old) * (len(new) - len(old)))
        if name == "join" and given and isinstance(given[0], list | tuple):
            self._check_size(sum(_size(value) for value in given[0]) + _size(owner) * len(given[0]))

    def _concatenate(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def _check_size(self, size: int) -> None:
        if size > self.max_characters:
            raise TemplateLimitError(f"it makes a text or list of more than {self.max_characters} items")


class _Generation(Extension):
    """The `generation` tag, by which training marks the assistant's words; here they are only rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` that takes no underscore names: they would reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's way to let `self` be a name too
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it keeps {name!r} in a namespace, where a name cannot begin with an underscore")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _as_method(name: str, value: Any, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A filter's arguments in the order of the method of the same name: only join's text comes second."""
    return (given[0] if given else "", (value,)) if name == "join" else (value, given)


def _filter(node: nodes.Expr, name: str, arguments: list[nodes.Expr], line: int) -> nodes.Filter:
    return nodes.Filter(node, name, arguments, [], None, None, lineno=line)


def _concatenation(node: nodes.Concat) -> nodes.Filter:
    return _filter(node.nodes[0], _CONCATENATE, node.nodes[1:], node.lineno)


def _replace_concatenations(parent: nodes.Node) -> None:
    for field, value in parent.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(parent, field, _concatenation(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Concat):
                    value[index] = _concatenation(item)
