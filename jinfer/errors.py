"""What can be wrong with what a user gave. Every message says what was given, what was expected and what to do."""


def shown(value: object, limit: int = 200) -> str:
    """A refused value as a message quotes it: whatever it is, the text is made and stays short."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > limit:
        return f"{repr(value[:limit])[:limit]}..."  # the text of all of it might have megabytes
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"a {type(value).__name__} with too many digits to show"
    return text if len(text) <= limit else f"{text[:limit]}..."


class JinferError(Exception):
    """Base of every error that jinfer raises on purpose."""


class UserError(JinferError, ValueError):
    """The caller's input is wrong; the engine is untouched and goes on serving."""


class ConfigError(UserError):
    """An unknown key, a value out of range, or options that contradict each other."""


class RequestError(UserError):
    """One request cannot be served as asked. `param` names the field at fault, if one is; `code` is a word for the
    kind of fault, for clients that tell kinds apart."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(RequestError):
    """The waiting queue is at its limit. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelError(UserError):
    """A model folder or checkpoint that cannot be used; names the file, key or tensor at fault."""


class RequestFailedError(JinferError, RuntimeError):
    """A fault in the handling of one request, which ended it; the engine goes on with all others."""


class EngineDeadError(JinferError, RuntimeError):
    """The engine loop failed; running requests ended with this error and health is false."""


class WeightsError(EngineDeadError):
    """An update of the weights failed midway: the engine takes no requests until a full update has succeeded."""
