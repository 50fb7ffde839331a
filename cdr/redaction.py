"""What may be printed, logged and stored of texts that may carry a password."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(value: Any) -> Any:
    """Take user names and passwords out of URIs, at any depth."""
    if isinstance(value, str):
        return _USER_INFO.sub("***", value)
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def first_line(error: Exception) -> str:
    """Give an error's kind and first line, without passwords."""
    lines = str(error).splitlines() or [""]
    return str(redact(f"{type(error).__name__}: {lines[0]}"))[:500]
