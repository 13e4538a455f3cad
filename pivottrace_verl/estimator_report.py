"""The estimator report: how well each estimator tells where the policy fails, and what to use.

Contract: everything rests on the labelled probes. Points and intervals are in the direction that
the probes give (0.5 is a coin toss, more is better); intervals are percentiles of a bootstrap over
the probes, with direction and fits kept. The sentences are read off the numbers: nothing presumes
that pivots win. The result is JSON-able, with None for what does not exist.

    report = assess(scores, probes, TriageConfig(), draws=1000, seed=0)
    report["estimators"], report["recommended"], report["sentences"]

Axes: N probes, B bootstrap draws.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pivottrace_verl.calibration import Floats, Outcome
from pivottrace_verl.estimator_sentences import sentences
from pivottrace_verl.estimators import NEED_HIDDEN_STATES, NEED_TRACES
from pivottrace_verl.evidence import RANDOM, Evidence, gather, none_if_nan, strength
from pivottrace_verl.fitted import FITTED, explain
from pivottrace_verl.plan import AUTO, TriageConfig
from pivottrace_verl.probe_statistics import (
    LEVEL,
    aurcs,
    aurocs,
    aurocs_within,
    bootstrap,
    interval,
    known,
    spearmans,
)
from pivottrace_verl.ranking import chosen_out_of_fold, problem, serving

STATISTICS = ("auroc", "auroc_within_length", "spearman", "aurc")
CHEAPER = ("length", "entropy", "consistency")
"""What pivots are compared with: none of them needs the attention."""
Progress = Callable[[int, int, str], None]
"""Called with (draws done, draws in all, what happened)."""


def assess(
    scores: Any,
    probes: Sequence[Outcome],
    cfg: TriageConfig,
    *,
    draws: int = 1000,
    seed: int = 0,
    costs: Mapping[str, float | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The whole report; see `_rows` for a row of `estimators`.

    `costs` are seconds a prompt, by estimator. Raises PivotTraceError as `ranking.rank_pool` does.
    """
    evidence = gather(scores, probes)
    n = len(evidence.probed.wrong)
    sampled = _sampled(evidence, draws, seed, progress)
    rows = _rows(evidence, sampled, costs or {})
    best = next(iter(serving(evidence, cfg)), None)
    report: dict[str, Any] = {
        "probes": n,
        "wrong_majorities": int(evidence.probed.wrong.sum()),
        "bootstrap": {"draws": draws, "seed": seed, "level": LEVEL},
        "alpha": cfg.alpha,
        "min_spearman": cfg.min_spearman,
        "estimators": rows,
        "random_order": {"auroc": 0.5, "spearman": 0.0, "aurc": float(evidence.probed.wrong.mean())}
        if n
        else None,
        "comparisons": _comparisons(evidence, rows, draws, seed),
        "fitted": {
            name: explain(evidence.probed, name)
            for name in FITTED
            if name not in evidence.not_offered
        },
        "not_offered": evidence.not_offered,
        "recommended": None
        if best is None
        else {
            "estimator": best["estimator"],
            "direction": best["direction"],
            "spearman": -strength(best),
            "p_adjusted": best["p_adjusted"],
        },
        "choosing": {"spearman_out_of_fold": none_if_nan(chosen_out_of_fold(evidence))},
        "configured": {"estimator": cfg.estimator, "refused": _refusal(evidence, cfg)},
    }
    report["sentences"] = sentences(report)
    return report


def cost_per_prompt(manifest: Mapping[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    """Seconds a prompt by estimator, from the manifest's timings; None where unknown.

    All share the rollouts and are computed while these are made, so they cost the same; those of
    the hidden states need a second pass over the rollouts on top, as do those of the traces where
    these were replayed; random needs nothing.
    """
    n, timings = manifest.get("pool", {}).get("n_prompts"), manifest.get("timings", {})
    parts = [timings[name] for name in ("score_generating", "score_own") if name in timings]
    shared = sum(parts) if parts else timings.get("score")
    again = timings.get("score_hidden_states") or None  # 0: there was no second pass.
    out: dict[str, float | None] = {}
    for name in names:
        needed = [shared]
        if name in NEED_HIDDEN_STATES:
            needed.append(again)
        if name in NEED_TRACES:
            needed.append(timings.get("score_replay", 0.0))
        known_all = n and None not in needed
        out[name] = 0.0 if name == RANDOM else (sum(needed) / n if known_all else None)
    return out


def _directed(evidence: Evidence) -> dict[str, Floats]:
    """[N] of every estimator, higher = more uncertain as the probes see it."""
    sign = {
        row["estimator"]: -1.0 if row["direction"] == "lower" else 1.0 for row in evidence.table
    }
    return {name: sign[name] * values for name, values in evidence.scores.items()}


def _sampled(
    evidence: Evidence, draws: int, seed: int, progress: Progress | None
) -> dict[tuple[str, str], Floats]:
    """(estimator, statistic) -> [1 + B], the probes themselves first."""
    probed, directed = evidence.probed, _directed(evidence)
    n = len(probed.wrong)
    parts: dict[tuple[str, str], list[Floats]] = {}
    done, once = 0, np.ones((1, n))
    for weights in [once, *([] if n == 0 else bootstrap(n, draws, seed))]:
        for name, score in directed.items():
            seen = known(score)
            w, x, wrong = weights[:, seen], score[seen], probed.wrong[seen]
            found = (
                aurocs(w, x, wrong),
                aurocs_within(w, x, wrong, probed.length[seen]),
                spearmans(w, x, probed.pass_rate[seen]),
                aurcs(w, x, wrong),
            )
            for statistic, values in zip(STATISTICS, found, strict=True):
                parts.setdefault((name, statistic), []).append(values)
        done += len(weights)
        if progress is not None:
            progress(done - 1, draws, "intervals")
    return {key: np.concatenate(values) for key, values in parts.items()}


def _estimate(values: Floats, level: float = LEVEL) -> dict[str, float | None]:
    low, high = interval(values[1:], level)
    return {
        "point": none_if_nan(float(values[0])),
        "low": none_if_nan(low),
        "high": none_if_nan(high),
    }


def _rows(
    evidence: Evidence,
    sampled: Mapping[tuple[str, str], Floats],
    costs: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """One row an estimator, the strongest first: estimator, n, measured, direction, the statistics
    as {point, low, high}, seconds_per_prompt, p_value and p_adjusted of the Spearman correlation,
    p_auroc and p_auroc_adjusted of the AUROC."""
    p, adjusted = evidence.auroc_p_values()
    return [
        {
            "estimator": row["estimator"],
            "n": row["n"],
            "measured": row["n"] > 0,
            "direction": row["direction"],
            **{name: _estimate(sampled[row["estimator"], name]) for name in STATISTICS},
            "seconds_per_prompt": costs.get(row["estimator"]),
            "p_value": row["p_value"],
            "p_adjusted": row["p_adjusted"],
            "p_auroc": none_if_nan(p[row["estimator"]]),
            "p_auroc_adjusted": none_if_nan(adjusted[row["estimator"]]),
        }
        for row in evidence.table
    ]


def _comparisons(
    evidence: Evidence, rows: Sequence[Mapping[str, Any]], draws: int, seed: int
) -> list[dict[str, Any]]:
    """The best pivot estimator's AUROC minus that of each cheaper one, on the probes that have
    both, paired: each draw resamples the probes once for both. Intervals hold together
    (Bonferroni), so that three chances to lose are no more than one."""
    named = {row["estimator"]: row for row in rows if row["auroc"]["point"] is not None}
    pivots = [name for name in named if name.startswith("pivot")]
    cheaper = [name for name in CHEAPER if name in named]
    if not pivots or not cheaper:
        return []
    # The most favourable of them, so that a loss is a loss of all.
    best = max(pivots, key=lambda name: named[name]["auroc"]["point"])
    directed, wrong = _directed(evidence), evidence.probed.wrong
    out = []
    for other in cheaper:
        both = known(directed[best]) & known(directed[other])
        n = int(both.sum())
        a, b, bad = directed[best][both], directed[other][both], wrong[both]
        values = np.concatenate(
            [
                aurocs(weights, a, bad) - aurocs(weights, b, bad)
                for weights in [np.ones((1, n)), *bootstrap(n, draws, seed)]
            ]
        )
        difference = _estimate(values, 1 - (1 - LEVEL) / len(cheaper))
        if difference["point"] is not None:
            out.append({"pivots": best, "against": other, "n": n, "difference": difference})
    return out


def _refusal(evidence: Evidence, cfg: TriageConfig) -> str | None:
    """Why triage would refuse the configured estimator; None if it would not, or it is auto."""
    if cfg.estimator == AUTO:
        return None
    row = next((r for r in evidence.table if r["estimator"] == cfg.estimator), None)
    if row is None:
        return evidence.not_offered.get(cfg.estimator, "the scores do not have it")
    return problem(evidence, cfg, row)
