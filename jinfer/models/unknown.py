"""What an unsupported model would need: part of the error for an unknown `model_type`."""

from __future__ import annotations

from pathlib import Path

from jinfer.models.fields import Fields


def what_is_missing(folder: Path, fields: Fields) -> str:
    """A few sentences, beginning with "; ", where the config is that of a plain decoder; else nothing."""
    return ""
