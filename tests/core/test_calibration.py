"""Ranks of many prompts, and how sure the calibration curve is of itself."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.calibration import calibrate, choose_probes, rank01

quick = settings(deadline=None, max_examples=60)
values = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, float("inf"), float("nan")])
ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@quick
@given(st.dictionaries(ids, values, min_size=1, max_size=40))
def test_ranks_equal_a_sort_by_value_then_id_for_any_ids_and_values(pairs):
    def key(pt_id):
        value = pairs[pt_id]
        unknown = math.isnan(value)
        return (unknown, 0.0 if unknown else value, pt_id)

    order = sorted(pairs, key=key)
    ranks = rank01(list(pairs.values()), list(pairs))
    by_rank = [pt_id for _, pt_id in sorted(zip(ranks, pairs, strict=True))]
    assert by_rank == order
    assert sorted(ranks) == pytest.approx(np.linspace(0, 1, len(pairs)) if len(pairs) > 1 else [1])


def test_ids_may_be_a_list_an_array_or_a_column_in_pieces():
    names = [f"{i * 7919 % 100:02d}" for i in range(100)]
    column = pa.chunked_array([pa.array(names[:30]), pa.array(names[30:])])
    tied = np.zeros(100)
    for given_ids in (names, pa.array(names), column):
        assert rank01(tied, given_ids).tolist() == rank01(tied, names).tolist()
        assert choose_probes(tied, given_ids, 9, 0) == choose_probes(tied, names, 9, 0)


def probes(n, rng):
    """Pass rate and majority fall with u, with the noise of single prompts."""
    u = np.sort(rng.random(n))
    return u, rng.binomial(8, 1 - u) / 8, rng.random(n) < 1 - u


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    sample = probes(64, np.random.default_rng(0))
    first, again, other = (calibrate(*sample, trusted=0.5, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.p_low != other.p_low
    assert (first.p, first.u_high) == (other.p, other.u_high)


def test_intervals_do_not_depend_on_the_order_of_the_probes():
    u, p, m = probes(40, np.random.default_rng(1))
    turned = calibrate(u[::-1], p[::-1], m[::-1], trusted=0.5)
    assert turned == calibrate(u, p, m, trusted=0.5)


@pytest.mark.parametrize("name", ["p", "m", "p_monotone", "m_monotone"])
def test_the_interval_lies_around_the_curve_and_shrinks_with_more_probes(name):
    widths = []
    for n in (32, 512):
        curve = calibrate(*probes(n, np.random.default_rng(2)), trusted=0.5)
        low, high = getattr(curve, f"{name}_low"), getattr(curve, f"{name}_high")
        middle = np.array(getattr(curve, name))
        assert len(low) == len(high) == n
        inside = (np.array(low) - 1e-3 <= middle) & (middle <= np.array(high) + 1e-3)
        assert inside.mean() > 0.9
        widths.append(np.mean(np.array(high) - np.array(low)))
    assert widths[1] < widths[0] / 2


def test_the_threshold_lies_in_its_interval_about_as_often_as_the_level_says():
    """The truth here: m(u) = 1 - u, so votes lose trust at u = 0.5."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        curve = calibrate(*probes(200, rng), trusted=0.5, draws=200)
        low, high = curve.u_high_interval
        held += (low or 0.0) <= 0.5 <= (1.0 if high is None else high)
    assert held >= 85


def test_a_threshold_that_some_draws_do_not_find_has_an_open_end():
    u = np.linspace(0, 1, 40)
    curve = calibrate(u, np.full(40, 0.5), np.where(u < 0.95, 1.0, 0.0), window=0.05)
    assert curve.u_high is not None
    assert curve.u_high_interval[1] is None
    certain = calibrate(u, np.full(40, 0.5), np.ones(40))
    assert certain.u_high is None
    assert certain.u_high_interval == (None, None)
    assert certain.u_low_interval == (None, None)


def test_one_probe_has_a_curve_and_an_interval_of_no_width():
    curve = calibrate([0.5], [0.25], [True])
    assert (curve.p, curve.p_low, curve.p_high) == ([0.25], [0.25], [0.25])
