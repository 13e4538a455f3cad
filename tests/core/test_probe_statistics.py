"""AUROC, Spearman, risk and coverage, and their bootstrap."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from pivottrace_verl.probe_statistics import (
    aurcs,
    aurocs,
    aurocs_within,
    bootstrap,
    interval,
    spearmans,
)

quick = settings(deadline=None, max_examples=80)
samples = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 8), st.booleans(), st.integers(0, 3)),
    min_size=2,
    max_size=12,
)


def columns(rows):
    score, rate, wrong, weight = (np.array(c) for c in zip(*rows, strict=True))
    return score.astype(float), rate / 8, wrong.astype(bool), weight.astype(float)


@quick
@given(samples)
def test_a_weighted_statistic_is_that_of_the_probes_repeated(rows):
    score, rate, wrong, weight = columns(rows)
    times = weight.astype(int)
    x, y, bad = np.repeat(score, times), np.repeat(rate, times), np.repeat(wrong, times)
    w, once = weight[None], np.ones((1, len(x)))
    for weighted, repeated in (
        (aurocs(w, score, wrong), aurocs(once, x, bad)),
        (spearmans(w, score, rate), spearmans(once, x, y)),
        (aurcs(w, score, wrong), aurcs(once, x, bad)),
    ):
        assert weighted[0] == pytest.approx(repeated[0], nan_ok=True)


@quick
@given(samples)
def test_spearman_is_scipys(rows):
    score, rate, _, _ = columns(rows)
    mine = spearmans(np.ones((1, len(score))), score, rate)[0]
    if np.ptp(score) == 0 or np.ptp(rate) == 0:
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(spearmanr(score, rate).statistic)


def test_the_risk_coverage_area_is_the_mean_risk_over_all_orders_of_the_tied():
    score, wrong = np.array([1.0, 0, 1, 1, 2]), np.array([True, False, False, True, True])
    areas = []
    for tied in itertools.permutations([0, 2, 3]):
        bad = wrong[[1, *tied, 4]]
        areas.append(np.mean(np.cumsum(bad) / np.arange(1, 6)))
    found = aurcs(np.ones((1, 5)), score, wrong)[0]
    assert found == pytest.approx(np.mean(areas))


def test_the_area_of_a_score_that_says_nothing_is_the_share_of_wrong_majorities():
    wrong = np.arange(20) < 7
    assert aurcs(np.ones((1, 20)), np.zeros(20), wrong)[0] == pytest.approx(0.35)
    perfect = aurcs(np.ones((1, 20)), wrong.astype(float), wrong)[0]
    inverted = aurcs(np.ones((1, 20)), -wrong.astype(float), wrong)[0]
    assert perfect < 0.1 and inverted > 0.6


def test_pairs_of_different_length_do_not_count_within_terciles():
    length = np.arange(9.0)
    wrong = np.array([0, 1, 0, 1, 0, 1, 0, 1, 1], dtype=bool)
    once = np.ones((1, 9))
    assert aurocs_within(once, wrong + 0.0, wrong, length)[0] == 1.0
    assert aurocs(once, length, wrong)[0] > 0.6
    tier = np.repeat([0.0, 1, 2], 3)
    assert aurocs_within(once, tier, wrong, length)[0] == 0.5


def test_draws_repeat_with_the_seed_and_each_holds_n_probes():
    one, again, other = (np.concatenate(list(bootstrap(50, 300, s))) for s in (0, 0, 1))
    assert one.shape == (300, 50)
    assert (one == again).all() and (one != other).any()
    assert (one.sum(axis=1) == 50).all()
    assert np.concatenate(list(bootstrap(30_000, 150, 0))).shape == (150, 30_000)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    truth = 0.7602  # Of two normals one standard deviation apart.
    for i in range(200):
        wrong = np.arange(64) < 28
        score = wrong + rng.normal(size=64)
        low, high = interval(aurocs(next(bootstrap(64, 400, i)), score, wrong))
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_draws_without_a_class_are_left_out_and_nothing_is_nan_only_if_all_are():
    wrong = np.array([True, False, False, False])
    drawn = aurocs(next(bootstrap(4, 200, 0)), np.arange(4.0), wrong)
    assert np.isnan(drawn).any()
    assert not math.isnan(interval(drawn)[0])
    assert math.isnan(interval([math.nan])[0])
    empty = np.ones((3, 0))
    none = np.array([])
    for found in (aurocs(empty, none, none > 0), spearmans(empty, none, none)):
        assert np.isnan(found).all() and len(found) == 3
    assert np.isnan(aurcs(empty, none, none > 0)).all()
    assert np.isnan(aurocs_within(empty, none, none > 0, none)).all()
