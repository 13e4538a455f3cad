"""What is read off traces: thresholds once for the pool, numbers of one rollout, features."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pivottrace_verl.answers import cluster
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.estimators import ESTIMATORS, VARIANTS, GroupRecord, RolloutRecord
from pivottrace_verl.pivots import FEATURES, DetectorConfig, calibrate_tau, count
from pivottrace_verl.traces import (
    FEATURE_NAMES,
    SIGNALS,
    Thresholds,
    calibrate,
    features,
    read_trace,
)

MAIN = DetectorConfig()


def make_trace(n_tokens=200, seed=0, layers=2):
    """stats [T, L, 1, F], token entropy [T], self-certainty [T]."""
    g = np.random.default_rng(seed)
    stats = g.random((n_tokens, layers, 1, len(FEATURES))).astype(np.float32)
    return stats, g.exponential(size=n_tokens).astype(np.float32), g.random(n_tokens, np.float32)


POOL = [make_trace(150 + 10 * i, i) for i in range(8)]
THRESHOLDS = calibrate([trace[:2] for trace in POOL], MAIN)


def make_group(*traces):
    rollouts = [
        RolloutRecord(
            n_tokens=len(trace[1]),
            logprob_mean=-1.0,
            answer="a",
            truncated=False,
            trace=read_trace(*trace, THRESHOLDS),
        )
        if trace is not None
        else RolloutRecord(10, -1.0, "a", False)
        for trace in traces
    ]
    return GroupRecord(rollouts, cluster(["a"] * len(rollouts), "exact"), "p", 0)


def test_every_threshold_is_one_constant_of_all_calibration_rollouts_together():
    stats = [trace[0] for trace in POOL]
    assert THRESHOLDS.detector.tau == calibrate_tau(stats, MAIN)
    for name, changed in VARIANTS.items():
        cfg = replace(MAIN, **changed)
        assert THRESHOLDS.variants[name] == replace(cfg, tau=calibrate_tau(stats, cfg))
    entropies = np.concatenate([trace[1] for trace in POOL])
    assert np.mean(entropies >= THRESHOLDS.fork_entropy) == pytest.approx(0.2, abs=0.01)


def test_the_variants_cover_both_signals_and_both_changes_and_differ_from_the_run():
    made = {(c["signal"], c["change"]) for c in VARIANTS.values()}
    assert len(made) == len(VARIANTS)
    assert {("response_distance", "abs"), ("response_distance", "rise")} < made
    assert ("response_long_mass", "rise") in made
    assert (MAIN.signal, MAIN.change) == ("response_long_mass", "abs")


def test_a_tau_the_user_gave_is_kept_and_the_variants_get_their_own():
    given = replace(MAIN, tau=0.125, refractory=3)
    found = calibrate([trace[:2] for trace in POOL], given)
    assert found.detector == given
    assert {cfg.refractory for cfg in found.variants.values()} == {3}
    assert all(cfg.tau != 0.125 for cfg in found.variants.values())


def test_the_manifest_gives_the_same_thresholds_back():
    manifest = json.loads(json.dumps(THRESHOLDS.to_manifest()))
    assert Thresholds.from_manifest(manifest) == THRESHOLDS
    del manifest["forks"]
    with pytest.raises(PivotTraceError, match="no forks"):
        Thresholds.from_manifest(manifest)


def test_rollouts_of_one_token_cannot_be_calibrated_on():
    with pytest.raises(PivotTraceError, match="calibrated"):
        calibrate([make_trace(1)[:2]], MAIN)


def test_a_rollout_is_read_as_the_detectors_count_it():
    stats, entropy, certainty = make_trace(seed=99)
    found = read_trace(stats, entropy, certainty, THRESHOLDS)
    assert found.pivots == count(stats, THRESHOLDS.detector) > 0
    assert found.variants == {n: count(stats, cfg) for n, cfg in THRESHOLDS.variants.items()}
    assert found.forks == int((entropy >= THRESHOLDS.fork_entropy).sum()) > 0
    assert found.entropy_mean == pytest.approx(entropy.mean())
    assert found.self_certainty_mean == pytest.approx(certainty.mean())
    for name, feature in SIGNALS.items():
        row = stats[..., FEATURES.index(feature)].mean(axis=(1, 2))
        assert found.signals[f"{name}_mean"] == pytest.approx(row.mean(), rel=1e-6)
        assert found.signals[f"{name}_std"] == pytest.approx(row.std(), rel=1e-6)


def test_features_are_means_over_the_traced_rollouts():
    group = make_group(make_trace(seed=1), None, make_trace(seed=2))
    found = features(group)
    assert tuple(found) == FEATURE_NAMES
    reads = [rollout.trace for rollout in group.rollouts if rollout.trace]
    assert found["mass_mean"] == pytest.approx(np.mean([t.signals["mass_mean"] for t in reads]))
    for name in ("pivot_density", *VARIANTS):
        assert found[name] == ESTIMATORS[name](group)


def test_features_say_nothing_of_length_and_are_few():
    assert 12 <= len(FEATURE_NAMES) <= 16
    assert not [name for name in FEATURE_NAMES if "length" in name or "count" in name]
    trace = make_trace(seed=5)
    twice = tuple(np.concatenate([part, part]) for part in trace)
    once, doubled = features(make_group(trace)), features(make_group(twice))
    for name in FEATURE_NAMES:
        assert doubled[name] == pytest.approx(once[name], rel=0.1), name


def test_features_of_a_group_without_traces_are_unknown():
    assert all(math.isnan(value) for value in features(make_group(None)).values())
