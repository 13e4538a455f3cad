"""Estimators fitted on the probes: the fit, out-of-fold values, the whole pool."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from pivottrace_verl.calibration import Outcome
from pivottrace_verl.fitted import (
    STRENGTHS,
    columns_for,
    design,
    explain,
    fit,
    out_of_fold,
    pool_values,
    why_not,
)
from pivottrace_verl.probe_statistics import auroc, spearman
from pivottrace_verl.score_columns import probe_columns


def drawn(n=60, d=5, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) + 3
    rate = 1 / (1 + np.exp((x - 3) @ np.ones(d) / d + noise * rng.normal(size=n)))
    return x, rate


def test_the_fit_is_ridge_regression_on_standardised_columns():
    x, rate = drawn()
    found = fit(x, rate[:, None])
    ridge = Ridge(alpha=found.strength[0] * len(x)).fit(StandardScaler().fit_transform(x), rate)
    assert found.weights[:, 0] == pytest.approx(-ridge.coef_)
    assert found.values(x)[:, 0] == pytest.approx(
        -(ridge.predict(StandardScaler().fit_transform(x)) - rate.mean())
    )


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_the_penalty_is_that_of_the_least_generalised_cross_validation_error(noise):
    x, rate = drawn(noise=noise)
    n, z = len(x), StandardScaler().fit_transform(x)
    errors = []
    for strength in STRENGTHS:
        hat = z @ np.linalg.inv(z.T @ z + strength * n * np.eye(5)) @ z.T + 1 / n
        residual = rate - hat @ rate
        errors.append((residual @ residual) / (n - np.trace(hat)) ** 2)
    assert fit(x, rate[:, None]).strength[0] == STRENGTHS[int(np.argmin(errors))]


def test_many_outcomes_at_once_are_as_one_after_the_other():
    x, rate = drawn()
    both = np.stack([rate, rate[::-1]], axis=1)
    together = out_of_fold(x, both)
    for b in range(2):
        assert together[:, b] == pytest.approx(out_of_fold(x, both[:, [b]])[:, 0])


def test_an_out_of_fold_value_does_not_depend_on_the_probes_own_outcome():
    # With a single pass over the folds every other value may move, its own may not.
    x, rate = drawn(n=1100)
    changed = rate.copy()
    changed[7] = 1 - changed[7]
    before, after = out_of_fold(x, rate[:, None]), out_of_fold(x, changed[:, None])
    assert before[7, 0] == after[7, 0]
    assert (before != after).any()


def test_out_of_fold_values_of_noise_are_noise_while_the_fit_flatters_itself():
    rng, inside, outside = np.random.default_rng(0), [], []
    for _ in range(40):
        x, rate = rng.normal(size=(64, 20)), rng.random(64)
        inside.append(-spearman(fit(x, rate[:, None]).values(x)[:, 0], rate)[0])
        outside.append(-spearman(out_of_fold(x, rate[:, None])[:, 0], rate)[0])
    assert np.mean(inside) > 0.3
    assert np.mean(outside) < 0.1


def test_a_missing_value_counts_as_the_mean_and_a_row_without_any_is_unknown():
    x, rate = drawn()
    x[0, 0], x[1] = np.nan, np.nan
    found = fit(x, rate[:, None])
    filled = x[[0]].copy()
    filled[0, 0] = np.delete(x[:, 0], 1)[1:].mean()
    assert found.values(x[[0]])[0, 0] == pytest.approx(found.values(filled)[0, 0])
    rest = [0, *range(2, 60)]
    assert found.weights == pytest.approx(fit(x[rest], rate[rest, None]).weights)
    assert np.isnan(out_of_fold(x, rate[:, None])[1, 0])


def test_a_constant_column_has_no_weight():
    x, rate = drawn()
    x[:, 2] = 7.1
    assert abs(fit(x, rate[:, None]).weights[2, 0]) < 1e-12


def test_the_columns_are_the_features_and_the_pivots_and_for_all_the_cheap_scores_too():
    names = ["uncertainty/pivot_count", "uncertainty/pivot_density", "uncertainty/entropy",
             "uncertainty/random", "uncertainty/coe", "features/mass", "features/pivot_density",
             "length_mean"]  # fmt: skip
    attention = ["features/mass", "features/pivot_density", "uncertainty/pivot_count"]
    assert columns_for("calibrated", names) == attention
    assert columns_for("calibrated_all", names) == [*attention, "uncertainty/entropy"]
    assert columns_for("calibrated_all", names[:5]) == []


def test_too_few_probes_of_a_class_and_scores_without_features_are_a_sentence(bed):
    made = bed("combination")
    assert why_not("calibrated", probe_columns(made.scores, made.probes)) is None
    right = [o for o in made.probes if o.majority_right]
    wrong = [o for o in made.probes if not o.majority_right]
    few = probe_columns(made.scores, right + wrong[:7])
    assert f"{len(right)} have a right and 7 a wrong majority" in why_not("calibrated", few)
    enough = probe_columns(made.scores, right + wrong[:8])
    assert why_not("calibrated", enough) is None
    bare = made.scores.drop_columns([f"features/f{i}" for i in range(8)])
    assert "no features/ columns" in why_not("calibrated", probe_columns(bare, made.probes))


def test_the_pool_is_ranked_by_all_probes_and_the_probes_by_fits_without_them(bed):
    made = bed("combination")
    probed = probe_columns(made.scores, made.probes)
    values = pool_values(made.scores, probed, "calibrated")
    names = columns_for("calibrated", list(probed.columns))
    x = design(probed.columns, names)
    everything = design({n: made.scores[n].to_numpy() for n in names}, names)
    whole = fit(x, probed.pass_rate[:, None]).values(everything)[:, 0]
    assert values[made.rest] == pytest.approx(whole[made.rest])
    assert values[probed.rows] == pytest.approx(out_of_fold(x, probed.pass_rate[:, None])[:, 0])
    assert auroc(values[made.rest], made.pass_rate[made.rest] < 0.5) > 0.9


def test_prompts_that_were_not_traced_stay_unknown():
    rng = np.random.default_rng(0)
    feature = rng.normal(size=100)
    feature[[3, 50]] = np.nan
    feature[4] = np.inf
    table = pa.table({"pt_id": [f"{i:03d}" for i in range(100)], "features/a": feature})
    probes = [Outcome(f"{i:03d}", float(feature[i] > 0), bool(feature[i] > 0)) for i in range(40)]
    values = pool_values(table, probe_columns(table, probes), "calibrated")
    assert np.flatnonzero(np.isnan(values)).tolist() == [3, 4, 50]


def test_the_weights_are_told(bed):
    made = bed("combination")
    told = explain(probe_columns(made.scores, made.probes), "calibrated")
    by_name = {row["column"]: row["weight"] for row in told["columns"]}
    assert len(by_name) == 10
    assert min(by_name[f"features/f{i}"] for i in range(6)) > abs(by_name["features/f7"])
