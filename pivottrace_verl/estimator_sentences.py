"""What the numbers of the estimator report say, in plain words.

Contract: reads the report of `estimator_report.assess` and nothing else. A loss of the pivots is
called one; what the probes do not settle is not called a win or a loss.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pivottrace_verl.estimators import NEED_HIDDEN_STATES, NEED_TRACES
from pivottrace_verl.plan import AUTO


def sentences(report: Mapping[str, Any]) -> list[str]:
    """On chance, the recommendation, the configured estimator, the pivots and what is not scored,
    in this order."""
    told = [_chance(report), _recommendation(report), *_default(report), _pivots(report)]
    return told + _not_scored(report)


def _chance(report: Mapping[str, Any]) -> str:
    n, wrong, alpha = report["probes"], report["wrong_majorities"], report["alpha"]
    if not 0 < wrong < n:
        which = "wrong" if wrong else "right"
        return f"All {n} majorities are {which}, so no estimator can be told from chance by AUROC."
    tried = [row for row in report["estimators"] if row["p_auroc_adjusted"] is not None]
    better = [row for row in tried if row["p_auroc_adjusted"] <= alpha]
    how = (
        f"(AUROC, permutation test with the largest of the {len(tried)} estimators tried, p at "
        f"most {alpha:g})"
    )
    if not better:
        return f"No estimator beats a random order {how}."
    names = ", ".join(
        f"{row['estimator']} ({row['auroc']['point']:.2f})"
        for row in sorted(better, key=lambda row: -row["auroc"]["point"])
    )
    return f"Better than a random order: {names} {how}."


def _recommendation(report: Mapping[str, Any]) -> str:
    best, honest = report["recommended"], report["choosing"]["spearman_out_of_fold"]
    if best is None:
        return (
            "Recommended: none. Nothing in the scores follows the probes' pass rates beyond "
            "chance; label at random, buy more probes or score with more rollouts."
        )
    told = "" if honest is None else f"; {honest:+.2f} on probes left out of the choice"
    name = best["estimator"]
    flipped = name.startswith("pivot") and best["direction"] == "lower"
    return (
        f"Recommended: {name}, {best['direction']} = more uncertain"
        + (", the opposite of the paper's direction" if flipped else "")
        + f" (Spearman with the pass rate {best['spearman']:+.2f}{told})."
    )


def _default(report: Mapping[str, Any]) -> list[str]:
    name, refused = report["configured"]["estimator"], report["configured"]["refused"]
    if refused is not None:
        return [f"Triage would refuse the estimator '{name}': {refused.rstrip('.')}."]
    return [] if name == AUTO else [f"The probes confirm the estimator '{name}'."]


def _pivots(report: Mapping[str, Any]) -> str:
    found = report["comparisons"]
    if not found:
        return "Pivots could not be compared with length, entropy or consistency."
    name = found[0]["pivots"]
    lost = [c for c in found if (c["difference"]["high"] or 0.0) < 0]
    won = [c for c in found if (c["difference"]["low"] or 0.0) > 0]
    if lost:
        return f"Pivots lose to something cheaper: {name} is below {_told(lost)}."
    behind = [c for c in found if c["difference"]["point"] < 0]
    if len(won) == len(found):
        return f"Pivots beat what is cheaper: {name} is above {_told(won)}."
    if behind:
        return (
            f"Pivots do not beat what is cheaper: {name} is below {_told(behind)}, "
            "though these probes do not settle it."
        )
    return (
        f"Pivots are ahead of what is cheaper, but these probes do not settle it: {name} against "
        f"{_told([c for c in found if c not in won])}."
    )


def _not_scored(report: Mapping[str, Any]) -> list[str]:
    names = [row["estimator"] for row in report["estimators"] if not row["measured"]]
    if not names:
        return []
    needs = ""
    traces = "`pivottrace score --capture on` or `--capture replay`"
    for some, what in (
        (NEED_TRACES, traces),
        (NEED_HIDDEN_STATES, "`pivottrace score --hidden-states`"),
    ):
        missing = [name for name in names if name in some]
        if missing:
            needs += f"; {', '.join(missing)} would need {what}"
    return [f"Not scored, so out of the running: {', '.join(names)}{needs}."]


def _told(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`consistency by 0.10 AUROC [0.02, 0.18]`, for each."""
    parts = []
    for comparison in comparisons:
        difference = comparison["difference"]
        sign = math.copysign(1.0, difference["point"])
        low, high = sorted((sign * difference["low"], sign * difference["high"]))
        parts.append(
            f"{comparison['against']} by {abs(difference['point']):.2f} AUROC "
            f"[{low:.2f}, {high:.2f}]"
        )
    return ", ".join(parts)
