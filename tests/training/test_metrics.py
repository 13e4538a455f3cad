"""Per-route metrics of a step."""

from typing import Any

import pytest

from pivottrace_verl.training.metrics import step_metrics
from tests.step_records import record as step_record


def record(route: str, reward: float, **more: Any) -> dict[str, Any]:
    plain = {"reward": reward, "agreement": 0.5, "majority_right": None, "pivot_density": 0.1}
    return step_record("p", route == "annotate", **{**plain, **more})


def test_groups_are_counted_as_mixed_all_right_and_all_wrong() -> None:
    rows = [("a", record("annotate", r)) for r in (1.0, 0.0)]
    rows += [("b", record("annotate", 1.0))] * 2 + [("c", record("annotate", 0.0))] * 2
    rows += [("d", record("annotate", 0.0))] * 2
    metrics = step_metrics(rows)
    assert metrics["pivottrace/annotate/prompts"] == 4
    assert metrics["pivottrace/annotate/mixed"] == 0.25
    assert metrics["pivottrace/annotate/all_right"] == 0.25
    assert metrics["pivottrace/annotate/all_wrong"] == 0.5


def test_groups_are_counted_by_what_is_right_and_without_what_timed_out() -> None:
    right = {"reward": 0.5, "right": 1.0}
    wrong = {"reward": -1.0, "right": 0.0}
    late = {"reward": 0.0, "timed_out": True, "weight": 0.0}
    groups = {"a": (right, right, late), "b": (wrong, {**wrong, "reward": -1.5}), "c": (late, late),
              "d": (right, wrong)}  # fmt: skip
    rows = [(key, record("annotate", **more)) for key, group in groups.items() for more in group]
    metrics = step_metrics(rows)
    for name in ("all_right", "all_wrong", "mixed"):
        assert metrics[f"pivottrace/annotate/{name}"] == 0.25
    assert metrics["pivottrace/annotate/weight"] == pytest.approx(6 / 9)
    assert metrics["pivottrace/annotate/timed_out"] == pytest.approx(3 / 9)


def test_routes_are_reported_apart_and_missed_traces_are_counted() -> None:
    rows = [
        ("a", record("annotate", 1.0, majority_right=True)),
        ("b", record("self_train", 0.0, outcome="no_vote", traced=False)),
    ]
    del rows[1][1]["pivot_density"]
    metrics = step_metrics(rows)
    assert metrics["pivottrace/capture/missed"] == 1
    assert metrics["pivottrace/annotate/pseudo_label_accuracy"] == 1
    assert metrics["pivottrace/self_train/no_vote"] == 1
    assert "pivottrace/self_train/pivot_density" not in metrics
    assert metrics["pivottrace/annotate/pivot_density"] == pytest.approx(0.1)


def test_the_share_of_rollouts_that_timed_out_is_reported() -> None:
    rows = [("a", record("self_train", 0.0, timed_out=late)) for late in (True, False, False)]
    rows.append(("a", record("self_train", 0.0)))
    assert step_metrics(rows)["pivottrace/self_train/timed_out"] == 0.25


def test_every_metric_is_a_float_for_verls_logger() -> None:
    metrics = step_metrics([("a", record("annotate", 1.0))])
    assert all(type(value) is float for value in metrics.values())


def test_what_became_of_weak_votes_is_told_apart_and_equal_soft_rewards_are_not_mixed() -> None:
    rows = [("a", record("self_train", 0.5, outcome="soft"))] * 2
    rows += [("b", record("self_train", r, outcome="soft")) for r in (0.25, 0.5)]
    rows += [("c", record("self_train", 0.0, outcome="dropped"))]
    rows += [("d", record("self_train", 0.0, outcome="no_vote"))]
    metrics = step_metrics(rows)
    assert metrics["pivottrace/self_train/mixed"] == 0.25
    for name, share in (("soft", 0.5), ("dropped", 0.25), ("no_vote", 0.25)):
        assert metrics[f"pivottrace/self_train/{name}"] == share
