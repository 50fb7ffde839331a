"""What all jobs do around their work: turn errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 bad config or input or setup, 3 finished above a threshold,
4 stopped early. YARN's cluster mode flattens them, so `runs` has the outcome too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from cdr.errors import CdrError

OK, FAILED, BAD_INPUT, OVER_THRESHOLD, STOPPED = 0, 1, 2, 3, 4

KEPT = "What was committed before is kept; the same command goes on from there."


def run_job(job: Callable[[], int]) -> int:
    """Run a job and give its exit code; an error is printed for the person who can cure it."""
    try:
        return job()
    except CdrError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nstopped. {KEPT}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        explained = explain_spark_error(error)
        if explained is None:
            raise
        print(f"\nerror: {explained}", file=sys.stderr)
        return FAILED


def end(exit_code: int) -> None:
    """End a program with its exit code; where that is 0, just return.

    A wheel task of Databricks calls the entry point in a Python of its own: it does not look at
    what that returns, and takes any exception, SystemExit too, for a failure.
    """
    if exit_code != OK:
        sys.exit(exit_code)


def explain_spark_error(error: BaseException) -> str | None:
    """Say what went wrong inside a Spark job; None when it is not an error this knows."""
    text = str(error)
    # A CdrError raised on a worker arrives as the text of a Python traceback in Java's.
    found = re.search(r"cdr\.errors\.(\w+): (.*?)(?:\n\s*\n|\n\tat |\Z)", text, re.DOTALL)
    if found:
        return f"{found.group(2).rstrip()}\n  {KEPT}"
    if "No space left on device" in text:
        return f"the disk is full: free some space or use another warehouse.\n  {KEPT}"
    if "MALFORMED_RECORD_IN_PARSING" in text or "Malformed records are detected" in text:
        return "the input holds a line that is not JSON\n  fix: check input.path and input.format"
    if "CONCURRENT" in text.upper() and "delta" in text.lower():
        return f"another run wrote the same rows at the same time; run again.\n  {KEPT}"
    return None
