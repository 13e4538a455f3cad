"""The one exception a user is meant to read, and the error that a child process ended with.

Contract: the message is one full sentence that names what is wrong and, where there are two
sides (this pool, that pool), names both. The command line prints it and exits with status 2.
"""

import re

MAX_ERROR = 400
_ERROR = re.compile(r"^(\(\w+ pid=\d+\) )?\s*(error: |[\w.]*(Error|Exception)\b[:(])")
"""Our own refusals, and the last line of a Python traceback, also where Ray marked the process."""


class PivotTraceError(Exception):
    """Bad input, a mismatch or a missing piece, told in one sentence."""


def last_error(output: str) -> str:
    """The last line of a process's output that reads like an error, cut to `MAX_ERROR` characters;
    empty if none does."""
    errors = [line.strip() for line in output.splitlines() if _ERROR.search(line)]
    return errors[-1][:MAX_ERROR] if errors else ""
