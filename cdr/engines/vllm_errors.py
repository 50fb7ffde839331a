"""Why vLLM did not load a model.

A model is loaded by child processes. When one fails, vLLM raises no more than "Engine core
initialization failed. See root cause above."; the cause went to standard error, which in an engine
host is the host's log. Where standard error is no file (a notebook), it stands above indeed.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from cdr.engines.base import EngineSpec
from cdr.errors import ModelError

_STDERR = Path("/proc/self/fd/2")
_POINTER = "root cause"  # in messages that say no more than where the cause is to be found
# (EngineCore pid=7) ERROR 11-26 05:46:20 [core.py:1099] ValueError: To serve at least one request …
_ERROR_LINE = re.compile(r"(?:^|[])] )([A-Za-z_][\w.]*(?:Error|Exception): .+)$", re.MULTILINE)
_MAX_CAUSES = 3
_MAX_LENGTH = 400


def measure_log() -> int:
    """Give the size of the file that standard error goes to, in bytes; 0 where it is no file."""
    try:
        found = os.fstat(2)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def explain_load(error: Exception, spec: EngineSpec, *, log_begin: int) -> ModelError:
    """Make the error of a model that vLLM did not load.

    Args:
        error: what vLLM raised.
        spec: what was to be loaded.
        log_begin: `measure_log()` before.
    """
    reason = flatten(error)
    if _POINTER in reason and (causes := _read_causes(log_begin)):
        reason = f"{'; '.join(causes)} ({reason})"
    return ModelError(
        f"vLLM cannot load the model: {reason}",
        where=f"engine vllm on {spec.path}",
        fix="vLLM's own messages are above, or in the host's log. Out of memory: lower max_length "
        "or batch_tokens, raise memory_fraction (a GPU) or extra.kv_cache_memory_bytes (a CPU). "
        "A head that is quantised: set head_dtype to the model's dtype",
    )


def flatten(error: Exception) -> str:
    """Give an error's message on one line, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:_MAX_LENGTH] or type(error).__name__


def _read_causes(begin: int) -> list[str]:
    """Read the last errors that the log has gained: first a worker's, then the core's of it."""
    if not measure_log():
        return []
    try:
        with _STDERR.open("rb") as log:
            log.seek(begin)
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    found = [line.strip()[:_MAX_LENGTH] for line in _ERROR_LINE.findall(text)]
    causes = dict.fromkeys(line for line in found if _POINTER not in line)
    return list(causes)[-_MAX_CAUSES:]
