"""Pivots of synthetic traces whose answer is known by construction."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import (
    FEATURES,
    DetectorConfig,
    calibrate_tau,
    changes,
    count,
    counts_of,
    density,
    find_pivots,
    pivots_of,
    signal,
    signals,
)

CFG = DetectorConfig(tau=0.5)
quick = settings(deadline=None, max_examples=80)
# Multiples of 1/8 keep sums, shifts and powers of two exact in floating point.
steps = st.lists(st.integers(-40, 40).map(lambda k: k / 8), min_size=2, max_size=60)


def make_trace(row, layers=1, heads=1, feature="response_long_mass"):
    trace = np.zeros((len(row), layers, heads, len(FEATURES)), dtype=np.float32)
    trace[..., FEATURES.index(feature)] = np.asarray(row, dtype=np.float32)[:, None, None]
    return trace


def test_a_constant_signal_has_no_pivot():
    assert count(make_trace([0.3] * 50), replace(CFG, tau=0.0)) == 0


def test_a_single_step_is_one_pivot_at_the_token_it_leads_into():
    assert find_pivots(make_trace([0, 0, 0, 1, 1, 1, 1]), CFG).tolist() == [3]


def test_a_fall_is_a_pivot_for_abs_and_none_for_rise():
    trace = make_trace([1] * 10 + [0] * 10)
    assert find_pivots(trace, CFG).tolist() == [10]
    assert find_pivots(trace, replace(CFG, change="rise")).tolist() == []


def test_a_pulse_shorter_than_the_refractory_window_is_one_pivot_and_a_longer_one_is_two():
    short = make_trace([0] * 10 + [1] * 4 + [0] * 10)
    long = make_trace([0] * 10 + [1] * 5 + [0] * 10)
    assert find_pivots(short, CFG).tolist() == [10]
    assert find_pivots(long, CFG).tolist() == [10, 15]


def test_the_larger_of_two_near_changes_is_the_pivot():
    assert find_pivots(make_trace([0, 0, 0, 0.6, 0.6, 2.0, 2.0]), CFG).tolist() == [5]


def test_a_change_equal_to_tau_counts_and_one_below_does_not():
    assert count(make_trace([0, 0, 0.5, 0.5]), CFG) == 1
    assert count(make_trace([0, 0, 0.4375, 0.4375]), CFG) == 0


def test_the_change_into_the_first_token_is_never_a_pivot():
    assert changes(np.array([9.0, 9.0, 9.0]), CFG).tolist() == [0, 0, 0]
    assert changes(np.array([0, 5, 0, 5.0]), replace(CFG, skip_first=3)).tolist() == [0, 0, 0, 5]


def test_the_signal_is_the_mean_over_layers_and_head_groups_of_the_chosen_feature():
    trace = np.zeros((3, 2, 2, len(FEATURES)), dtype=np.float32)
    trace[..., FEATURES.index("distance")] = np.arange(12).reshape(3, 2, 2)
    assert signal(trace, DetectorConfig(signal="distance")).tolist() == [1.5, 5.5, 9.5]
    assert signal(trace, DetectorConfig(signal="entropy")).tolist() == [0, 0, 0]


def test_density_is_pivots_per_token_and_zero_for_an_empty_rollout():
    trace = make_trace([0] * 10 + [1] * 10)
    assert density(trace, CFG) == 1 / 20
    assert density(make_trace([]), CFG) == 0.0


@quick
@given(steps, st.integers(-16, 16))
def test_pivots_do_not_move_when_the_signal_is_shifted(row, shift):
    here = find_pivots(make_trace(row), CFG)
    there = find_pivots(make_trace(np.asarray(row) + shift), CFG)
    assert here.tolist() == there.tolist()


@quick
@given(st.lists(steps, min_size=1, max_size=4), st.sampled_from([0.25, 2.0, 8.0]))
def test_pivots_do_not_move_when_the_signal_is_scaled_and_tau_calibrated_again(rows, scale):
    def all_pivots(factor):
        traces = [make_trace(np.asarray(row) * factor) for row in rows]
        cfg = replace(CFG, tau=calibrate_tau(traces, CFG))
        return [find_pivots(trace, cfg).tolist() for trace in traces]

    assert all_pivots(1.0) == all_pivots(scale)


@quick
@given(steps, st.integers(1, 12))
def test_pivots_are_at_least_the_refractory_window_apart(row, refractory):
    found = find_pivots(make_trace(row), replace(CFG, refractory=refractory))
    assert (np.diff(found) >= refractory).all()


@quick
@given(steps, st.floats(0, 4), st.floats(0, 4))
def test_a_higher_tau_finds_a_subset(row, tau_a, tau_b):
    low, high = sorted((tau_a, tau_b))
    trace = make_trace(row)
    few = find_pivots(trace, replace(CFG, tau=high))
    assert set(few.tolist()) <= set(find_pivots(trace, replace(CFG, tau=low)).tolist())


def test_tau_is_one_quantile_of_all_rollouts_so_density_can_differ_between_them():
    rng = np.random.default_rng(0)
    calm = [make_trace(np.cumsum(rng.normal(0, 0.01, 200))) for _ in range(4)]
    wild = [make_trace(np.cumsum(rng.normal(0, 1.0, 200))) for _ in range(4)]
    cfg = replace(CFG, tau=calibrate_tau(calm + wild, CFG))
    pooled = np.concatenate([changes(signal(t, cfg), cfg)[1:] for t in calm + wild])
    assert cfg.tau == pytest.approx(np.quantile(pooled, 0.95))
    assert all(density(t, cfg) == 0 for t in calm)
    assert all(density(t, cfg) > 0.02 for t in wild)


def test_the_default_detector_is_the_measured_one():
    cfg = DetectorConfig()
    assert (cfg.signal, cfg.change, cfg.refractory) == ("response_long_mass", "abs", 5)
    assert (cfg.tau_quantile, cfg.window, cfg.sink, cfg.tau) == (0.95, 32, 4, None)
    assert len(FEATURES) == 25


def test_a_detector_survives_the_manifest():
    assert DetectorConfig.from_dict(CFG.to_dict()) == CFG


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"signal": "loudness"}, "loudness"),
        ({"change": "fall"}, "fall"),
        ({"tau_quantile": 1.0}, "1.0"),
        ({"refractory": 0}, "refractory"),
        ({"tau": float("nan")}, "nan"),
        ({"tau": -1.0}, "-1.0"),
    ],
)
def test_a_detector_that_cannot_work_is_refused_in_a_sentence(changed, said):
    with pytest.raises(PivotTraceError, match=re.escape(said)):
        replace(DetectorConfig(), **changed)


def test_an_unknown_field_in_a_manifest_is_refused():
    with pytest.raises(PivotTraceError, match="volume"):
        DetectorConfig.from_dict({"volume": 11})


def test_an_uncalibrated_detector_refuses_to_count():
    with pytest.raises(PivotTraceError, match="no tau"):
        count(make_trace([0, 1]), DetectorConfig())


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(PivotTraceError, match="calibrated"):
        calibrate_tau([make_trace([1.0])], CFG)


def test_a_broken_capture_is_not_a_calm_rollout():
    with pytest.raises(ValueError, match="not finite"):
        count(make_trace([0.1, float("nan"), 0.2]), CFG)
    with pytest.raises(ValueError, match="T, L, H"):
        count(np.zeros((5, 1, 25), dtype=np.float32), CFG)


@quick
@given(
    steps, st.integers(1, 12), st.sampled_from(["abs", "rise"]), st.sampled_from([0.0, 0.5, 2.0])
)
def test_pivots_are_those_of_a_scan_token_by_token(row, refractory, change, tau):
    cfg = replace(CFG, refractory=refractory, change=change, tau=tau)
    step = changes(np.asarray(row), cfg)
    expected = []
    for i, size in enumerate(step):
        before = step[max(0, i - refractory + 1) : i]
        after = step[i + 1 : i + refractory]
        if size >= tau and size > 0 and (before < size).all() and (after <= size).all():
            expected.append(i)
    assert find_pivots(make_trace(row), cfg).tolist() == expected


@quick
@given(
    st.lists(st.lists(st.integers(-40, 40).map(lambda k: k / 8), max_size=30), max_size=6),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_many_signals_at_once_have_the_pivots_of_each(rows, refractory, skip_first, tau):
    cfg = replace(CFG, refractory=refractory, skip_first=skip_first, tau=tau)
    rows = [np.asarray(row, dtype=np.float32) for row in rows]
    assert counts_of(rows, cfg) == [len(pivots_of(row, cfg)) for row in rows]


def test_long_signals_have_the_same_pivots_one_by_one(monkeypatch):
    rows = [np.random.default_rng(i).random(50).cumsum() % 1 for i in range(4)]
    joined = counts_of(rows, CFG)
    assert sum(joined) > 0
    monkeypatch.setattr("pivottrace_verl.pivots.MANY_TOKENS", 50)
    assert counts_of(rows, CFG) == joined


def test_a_signals_end_hides_no_pivot_at_the_start_of_the_next():
    rows = [np.array([0.0, 0.0, 0.0, 9.0]), np.array([0.0, 1.0, 1.0, 1.0])]
    assert counts_of(rows, replace(CFG, refractory=5)) == [1, 1]


def test_a_signal_has_the_same_bits_alone_and_among_others():
    trace = np.random.default_rng(0).random((40, 4, 5, len(FEATURES)), dtype=np.float32)
    together = signals(trace, FEATURES)
    for i, name in enumerate(FEATURES):
        assert np.array_equal(together[:, i], signal(trace, DetectorConfig(signal=name)))
        assert np.allclose(together[:, i], trace[..., i].mean(axis=(1, 2)), atol=1e-6)
