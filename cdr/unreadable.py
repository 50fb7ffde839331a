"""Spark's errors about a file it cannot read, as what is wrong with which file and what to do.

They come as the text of a Java error, while a schema is read or in the middle of a job: the name of
the file in one line of it, the cause in another. Pure text: no Spark.
"""

from __future__ import annotations

import re

from cdr.errors import InputError

_FILE = re.compile(r"[Ee]rror while reading file (?P<file>.+?)\.(?=\s|$)")
_DENIED = re.compile(
    r"FileNotFoundException: (?P<file>.+) \(Permission denied\)"
    r"|(?:AccessControlException|AccessDeniedException): .*"
)
_NOT_JSON = re.compile(r"MALFORMED_RECORD_IN_PARSING|Malformed records are detected")
_GONE = re.compile(r"FAILED_READ_FILE\.FILE_NOT_EXIST|FileNotFoundException")


def explain_unreadable(text: str, *, place: str | None = None) -> InputError | None:
    """Say which file cannot be read and why; None when the error is about something else.

    Args:
        text: the error with its causes, as Java prints them.
        place: the input that was read, where the text names no file.
    """
    file, denied = _FILE.search(text), _DENIED.search(text)
    named = next((found["file"] for found in (file, denied) if found and found["file"]), place)
    if denied:
        # Before the rest: Hadoop calls a local file that may not be read one that is not found.
        return InputError(
            "no permission to read a file",
            where=named,
            fix="let the user that Spark runs as read it",
        )
    if _NOT_JSON.search(text) and "/_delta_log/" not in str(named):
        return InputError(
            "the input holds a line that is not JSON",
            where=named,
            fix="check input.path and input.format; a JSON object must stand on one line",
        )
    if file is None:
        return None
    if _GONE.search(text):
        return InputError(
            "a file is not there any more",
            where=named,
            fix="run again if the input was being written; a Delta table whose files were deleted "
            "has to be restored, or read at another input.version",
        )
    return InputError(
        "a file is damaged, cut off or of another format",
        where=named,
        fix="write it again or take it out of the input, and check input.format",
    )
