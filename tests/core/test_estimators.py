"""Estimators on groups whose score can be worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.answers import cluster
from pivottrace_verl.estimators import (
    ESTIMATORS,
    NEED_HIDDEN_STATES,
    NEED_TRACES,
    VARIANTS,
    GroupRecord,
    RolloutRecord,
    TraceRecord,
)
from pivottrace_verl.estimators.coe import coe_c
from pivottrace_verl.estimators.cot_kinetics import GAMMA, energy


def make_trace(pivots=1, entropy=0.5, certainty=2.0, forks=1):
    return TraceRecord(pivots, entropy, certainty, forks, dict.fromkeys(VARIANTS, 2 * pivots))


def make_rollout(n_tokens=10, answer="a", logprob=-0.5, states=None, **trace):
    traced = None if trace.get("pivots", 1) is None else make_trace(**trace)
    return RolloutRecord(n_tokens, logprob, answer, False, traced, states)


def make_group(*rollouts, pt_id="p", seed=0):
    clusters = cluster([r.answer for r in rollouts], "exact")
    return GroupRecord(list(rollouts), clusters, pt_id, seed)


GROUP = make_group(
    make_rollout(10, "a", -0.1, pivots=1, entropy=0.2, certainty=9.0, forks=0),
    make_rollout(20, "a", -0.2, pivots=6, entropy=0.4, certainty=6.0, forks=5),
    make_rollout(30, None, -0.3, pivots=None),
    make_rollout(40, "b", -0.8, pivots=8, entropy=0.6, certainty=3.0, forks=20),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pivot_density", (0.1 + 0.3 + 0.2) / 3),
        ("pivot_count", 5.0),
        *((name, 2 * (0.1 + 0.3 + 0.2) / 3) for name in VARIANTS),
        ("entropy", 0.4),
        ("entropy_forks", (0 + 0.25 + 0.5) / 3),
        ("self_certainty", -6.0),
        ("nll", 0.35),
        ("consistency", 0.5),
        ("length", 25.0),
    ],
)
def test_scores_are_means_over_the_rollouts_that_were_captured(name, expected):
    assert ESTIMATORS[name](GROUP) == pytest.approx(expected)


def test_a_group_that_was_never_traced_is_unknown_not_certain():
    group = make_group(make_rollout(pivots=None))
    assert all(math.isnan(ESTIMATORS[name](group)) for name in NEED_TRACES)
    assert ESTIMATORS["consistency"](group) == 0.0


def test_hidden_state_estimators_are_unknown_unless_asked_for_and_all_others_are_known():
    unknown = {name for name, score in ESTIMATORS.items() if math.isnan(score(GROUP))}
    assert unknown == set(NEED_HIDDEN_STATES) == {"coe", "cot_kinetics"}


def test_a_rollout_without_a_pivot_counts_as_zero_not_as_missing():
    group = make_group(make_rollout(pivots=0, entropy=0.0), make_rollout(pivots=4, entropy=1.0))
    assert ESTIMATORS["pivot_count"](group) == 2.0
    assert ESTIMATORS["entropy"](group) == 0.5


@pytest.mark.parametrize(
    ("sure", "unsure", "names"),
    [
        ({"certainty": 9.0}, {"certainty": 1.0}, ["self_certainty"]),
        ({"logprob": -0.1}, {"logprob": -2.0}, ["nll"]),
        ({"forks": 0, "entropy": 0.1}, {"forks": 9, "entropy": 2.0}, ["entropy", "entropy_forks"]),
    ],
)
def test_a_higher_score_means_more_uncertain(sure, unsure, names):
    for name in names:
        score = ESTIMATORS[name]
        assert score(make_group(make_rollout(**sure))) < score(make_group(make_rollout(**unsure)))


def test_random_depends_on_seed_and_prompt_only():
    score = ESTIMATORS["random"]
    assert score(make_group(make_rollout())) == score(make_group(make_rollout(pivots=9)))
    assert score(make_group(make_rollout())) != score(make_group(make_rollout(), seed=1))
    assert score(make_group(make_rollout())) != score(make_group(make_rollout(), pt_id="q"))
    draws = [score(make_group(make_rollout(), pt_id=str(i))) for i in range(500)]
    assert 0.45 < sum(draws) / 500 < 0.55
    assert all(0 <= d < 1 for d in draws)


def test_the_names_of_files_and_of_estimators_are_the_same():
    for name, score in ESTIMATORS.items():
        assert score.__module__ == f"pivottrace_verl.estimators.{name}"


# Hidden states


def walk(*points):
    return np.array(points, dtype=np.float32)


def test_chain_of_embedding_of_a_quarter_turn_in_two_equal_steps():
    # Two steps of 45 degrees on the unit circle: each 2 sin(22.5) of the chord sqrt(2) long, each
    # half of the whole turn.
    half = math.sqrt(0.5)
    states = walk((1, 0), (half, half), (0, 1))
    assert coe_c(states) == pytest.approx(2 * math.sin(math.pi / 8) / math.sqrt(2), rel=1e-6)


def test_chain_of_embedding_is_written_out_in_the_paper_as_a_sum_of_complex_numbers():
    h = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    norm = np.linalg.norm

    def angle(a, b):
        return math.acos(float(a @ b) / float(norm(a) * norm(b)))

    real, imaginary = [], []
    for before, after in itertools.pairwise(h):
        length = norm(after - before) / norm(h[-1] - h[0])
        turn = angle(after, before) / angle(h[-1], h[0])
        real.append(length * math.cos(turn))
        imaginary.append(length * math.sin(turn))
    expected = math.hypot(sum(real) / 6, sum(imaginary) / 6)
    assert coe_c(h) == pytest.approx(expected, rel=1e-5)


def test_kinetic_energy_counts_movement_for_and_turning_against():
    straight = walk((0, 0), (1, 0), (2, 0), (3, 0))
    assert energy(straight) == pytest.approx(1 / 9 / 2, rel=1e-6)
    bent = walk((0, 0), (1, 0), (1, 1), (2, 1))
    assert energy(bent) == pytest.approx(1 / 5 / 2 - GAMMA / 2, rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.1, 100))
def test_hidden_state_scores_do_not_depend_on_the_scale_of_the_states(seed, scale):
    h = np.random.default_rng(seed).normal(size=(5, 8))
    assert coe_c(h * scale) == pytest.approx(coe_c(h), rel=1e-6)
    assert energy(h * scale) == pytest.approx(energy(h), rel=1e-6)


def test_a_state_that_does_not_move_is_unknown():
    still = np.ones((4, 3), dtype=np.float32)
    assert coe_c(still) is None and energy(still) is None
    group = make_group(make_rollout(states=still))
    assert all(math.isnan(ESTIMATORS[name](group)) for name in NEED_HIDDEN_STATES)


def test_hidden_state_scores_are_negated_means_over_the_rollouts():
    rng = np.random.default_rng(1)
    states = [rng.normal(size=(5, 8)) for _ in range(3)]
    group = make_group(*(make_rollout(states=s) for s in states), make_rollout())
    assert ESTIMATORS["coe"](group) == pytest.approx(-np.mean([coe_c(s) for s in states]))
    assert ESTIMATORS["cot_kinetics"](group) == pytest.approx(-np.mean([energy(s) for s in states]))
