"""The one exception a user is meant to read.

Contract: the message is one full sentence that names what is wrong and, where there are two
sides (this pool, that pool), names both. The command line prints it and exits with status 2.
"""


class PivotTraceError(Exception):
    """Bad input, a mismatch or a missing piece, told in one sentence."""
