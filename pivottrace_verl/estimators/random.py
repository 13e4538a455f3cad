"""A number that knows nothing: the baseline that counts at equal budget."""

import hashlib

from pivottrace_verl.estimators.records import GroupRecord

NAME = "random"


def score(group: GroupRecord) -> float:
    """In [0, 1), from the run's seed and the prompt id alone."""
    digest = hashlib.sha256(f"random/{group.seed}/{group.pt_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
