"""PivotTrace disturbs nothing: the kill switch, and all prompts labelled, train as stock verl does.

Under `tests.reproducible` stock verl is first shown to equal itself, otherwise an equality would
prove nothing. verl's own shuffling and the curriculum's order `random` draw from different
generators, so stock verl reads, in order, a file of the prompts that the curriculum will draw.
"""

from pathlib import Path

import pytest

from pivottrace_verl.curriculum import Curriculum, CurriculumConfig, Items
from tests.verl_jobs import (
    OURS,
    STOCK,
    assert_same_run,
    comparable,
    labelled_rows,
    read_lines,
    rollouts,
    run_job,
    write_rows,
)

pytestmark = pytest.mark.slow

STEPS, BATCH, SEED = 10, 8, 3


@pytest.fixture(scope="module")
def files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pool's rows, for us; for stock verl the same in the order in which we draw them."""
    rows = labelled_rows(data)
    folder = tmp_path_factory.mktemp("rows")
    info = [row["extra_info"] for row in rows]
    items = Items.of(
        *([row[n] for row in info] for n in ("index", "pt_id", "route", "uncertainty"))
    )
    config = CurriculumConfig(batch_size=BATCH, order="random", seed=SEED)
    drawn = Curriculum(items, config)
    sequence = [rows[next(drawn)] for _ in range(STEPS * BATCH)]
    return write_rows(folder / "ours.parquet", rows), write_rows(folder / "stock.parquet", sequence)


@pytest.fixture(scope="module")
def stock(policy: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "job"
    return run_job(folder, STOCK, policy, files[1], steps=STEPS, batch_size=BATCH)


def test_stock_verl_equals_itself_under_these_settings(
    policy: Path, files: tuple[Path, Path], stock: Path, tmp_path: Path
) -> None:
    again = run_job(tmp_path / "job", STOCK, policy, files[1], steps=STEPS, batch_size=BATCH)
    assert_same_run(again, stock, STEPS)
    steps = comparable(read_lines(stock / "metrics.jsonl"))
    assert sum(step["actor/grad_norm"] > 0 for step in steps) >= STEPS / 2
    assert len({prompt for step in rollouts(stock / "rollouts") for prompt, *_ in step}) > BATCH


def test_with_the_kill_switch_our_trainer_equals_stock_verl(
    policy: Path, files: tuple[Path, Path], stock: Path, tmp_path: Path
) -> None:
    ours = run_job(
        tmp_path / "job", OURS, policy, files[1],
        steps=STEPS, batch_size=BATCH, PIVOTTRACE_DISABLE="1",
    )  # fmt: skip
    assert_same_run(ours, stock, STEPS)
    steps = comparable(read_lines(ours / "metrics.jsonl"))
    assert not any(name.startswith("pivottrace/") for step in steps for name in step)


def test_with_every_prompt_labelled_pivottrace_equals_stock_verl(
    policy: Path, files: tuple[Path, Path], stock: Path, tmp_path: Path
) -> None:
    ours = run_job(
        tmp_path / "job", OURS, policy, files[0],
        "pivottrace.curriculum.order=random", f"pivottrace.curriculum.seed={SEED}",
        "pivottrace.detector.tau=0.05", steps=STEPS, batch_size=BATCH,
    )  # fmt: skip
    assert_same_run(ours, stock, STEPS)
    for step in comparable(read_lines(ours / "metrics.jsonl")):
        assert step["pivottrace/annotate/weight"] == 1.0
        assert step["pivottrace/capture/traced"] > 0
        assert step["pivottrace/capture/missed"] == 0
