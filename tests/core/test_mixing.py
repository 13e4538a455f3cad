"""The weights of the routes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.mixing import Mixing, MixingConfig


def test_a_constant_weight_stays_whatever_is_observed():
    mixing = Mixing(MixingConfig(self_train=0.3))
    mixing.observe(0, 10)
    assert mixing.weights(1) == mixing.weights(99) == {"annotate": 1.0, "self_train": 0.3}


def test_a_scheduled_weight_moves_linearly_and_then_stays():
    mixing = Mixing(MixingConfig(self_train=0.2, policy="scheduled", self_train_end=1.0, steps=4))
    weights = [mixing.weights(step)["self_train"] for step in range(1, 8)]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_a_measured_weight_is_nothing_before_the_first_measurement_and_at_chance():
    mixing = Mixing(MixingConfig(policy="measured"))
    assert mixing.weights(1)["self_train"] == 0.0
    mixing.observe(5, 10)
    assert mixing.weights(2)["self_train"] == 0.0
    assert Mixing(MixingConfig(policy="measured")).metrics() == {}


def test_a_measured_weight_is_the_part_of_the_vote_that_teaches():
    mixing = Mixing(MixingConfig(self_train=0.5, policy="measured", smoothing=0.5))
    mixing.observe(9, 10)
    assert mixing.weights(2)["self_train"] == pytest.approx(0.5 * 0.8)
    mixing.observe(0, 0)
    assert mixing.accuracy() == pytest.approx(0.9)
    mixing.observe(5, 10)
    assert mixing.accuracy() == pytest.approx((9 / 4 + 5) / (10 / 4 + 10))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))),
    st.floats(0, 0.99),
)
def test_a_measured_weight_is_never_below_zero_nor_above_its_base(steps, smoothing):
    mixing = Mixing(MixingConfig(self_train=2.0, policy="measured", smoothing=smoothing))
    for right, votes in steps:
        mixing.observe(right, votes)
        assert 0.0 <= mixing.weights(1)["self_train"] <= 2.0 + 1e-9
    resumed = Mixing(MixingConfig(self_train=2.0, policy="measured", smoothing=smoothing))
    resumed.load_state_dict(mixing.state_dict())
    assert resumed.weights(1) == mixing.weights(1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"policy": "guessed"}, "guessed"),
        ({"self_train": -1.0}, "self_train is -1.0"),
        ({"annotate": float("nan")}, "annotate is nan"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"policy": "scheduled", "steps": 5}, "self_train_end and steps"),
        ({"policy": "scheduled", "self_train_end": 1.0, "steps": 0}, "None|1.0 and 0"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_a_sentence(config, said):
    with pytest.raises(PivotTraceError, match=said):
        MixingConfig(**config)
