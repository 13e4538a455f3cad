"""Permutation tests: what chance alone would show."""

import numpy as np
from scipy.stats import spearmanr

from pivottrace_verl.chance import deal, p_values

BOTH = np.array([0])


def outcomes_of(rng, n=64):
    rate = rng.binomial(8, rng.random(n)) / 8
    return rate, rate < 0.5


def dealt(scores, rate, wrong, designs=None):
    return deal(scores, designs or {}, rate, wrong)


def test_the_first_deal_is_the_real_one():
    rng = np.random.default_rng(0)
    rate, wrong = outcomes_of(rng)
    score = np.round(rng.normal(size=64), 1)
    score[:5] = np.nan
    found = dealt({"a": score, "b": rng.normal(size=64)}, rate, wrong)
    assert found.names == ["a", "b"]
    assert abs(found.spearman[0, 0] - spearmanr(score[5:], rate[5:]).statistic) < 1e-12
    above = score[5:][wrong[5:]][:, None] - score[5:][~wrong[5:]][None]
    assert abs(found.auroc[0, 0] - ((above > 0) + 0.5 * (above == 0)).mean()) < 1e-12


def test_p_values_agree_with_the_t_approximation_on_64_probes():
    rng = np.random.default_rng(1)
    for strength in (0.0, 0.3, 0.6):
        rate, wrong = outcomes_of(rng)
        score = strength * rate + 0.5 * rng.normal(size=64)
        p, _ = p_values(dealt({"a": score}, rate, wrong).spearman, BOTH)
        assert abs(p[0] - spearmanr(score, rate).pvalue) < 0.04


def test_a_given_direction_counts_one_side_only():
    rng = np.random.default_rng(2)
    rate, wrong = outcomes_of(rng)
    stack = dealt({"a": -rate + 0.6 * rng.normal(size=64)}, rate, wrong).spearman
    both, low, high = (p_values(stack, np.array([side]))[0][0] for side in (0, -1, 1))
    assert low <= both < 0.05 and high > 0.95


def test_chance_passes_one_uninformative_score_in_twenty_and_the_best_of_ten_as_well():
    rng, alone, best, naive = np.random.default_rng(3), 0, 0, 0
    for _ in range(200):
        rate, wrong = outcomes_of(rng, 40)
        shared = rng.normal(size=40)
        scores = {str(i): shared + rng.normal(size=40) for i in range(10)}
        p, adjusted = p_values(dealt(scores, rate, wrong).spearman, np.zeros(10, dtype=np.int64))
        alone += p[0] <= 0.05
        best += adjusted.min() <= 0.05
        naive += p.min() <= 0.05
        assert (adjusted >= p).all()
    assert alone / 200 < 0.11
    assert best / 200 < 0.11
    assert naive / 200 > 0.2


def test_an_estimator_without_a_statistic_is_not_among_those_tried():
    rng = np.random.default_rng(4)
    rate, wrong = outcomes_of(rng)
    score = rng.normal(size=64) - rate
    unknown, constant = np.full(64, np.nan), np.ones(64)
    with_them = dealt({"a": score, "u": unknown, "c": constant}, rate, wrong).spearman
    p, adjusted = p_values(with_them, np.zeros(3, dtype=np.int64))
    assert np.isnan(p[1:]).all() and np.isnan(adjusted[1:]).all()
    assert adjusted[0] == p[0]


def test_a_fitted_estimator_is_fitted_anew_in_every_deal():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(60):
        rate, wrong = outcomes_of(rng, 40)
        found = dealt({}, rate, wrong, {"fitted": rng.normal(size=(40, 10))})
        hits += p_values(found.spearman, np.array([-1]))[0][0] <= 0.05
    # Dealing only the outcomes under a fit that is kept would let far more through.
    assert hits / 60 < 0.17


def test_nothing_at_all_is_no_error():
    empty = np.array([])
    found = dealt({"a": empty}, empty, empty > 0)
    assert np.isnan(p_values(found.spearman, BOTH)[0]).all()
    assert dealt({}, np.ones(5), np.ones(5) > 0).spearman.shape[1] == 0
