"""Scores of another version are refused in a sentence that names what they lack."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pivottrace_verl.errors import PivotTraceError
from tests.score_table import score_row

LACKING = ["uncertainty/self_certainty", "features/mass_mean"]


def without(path, columns):
    table = pq.read_table(path)
    kept: pa.Table = table.drop_columns(columns)
    pq.write_table(kept, path)
    return path.read_bytes()


@pytest.fixture
def scored(make_run):
    run = make_run(n=6)
    ids = [prompt.pt_id for prompt in run.pool()]
    for i in (0, 1):
        run.write_score_part(i, [score_row(pt_id) for pt_id in ids[3 * i : 3 * i + 3]])
    return run


def test_reading_them_names_the_missing_columns(scored):
    scored.merge_scores()
    before = without(scored.path / "scores.parquet", LACKING)
    with pytest.raises(PivotTraceError, match="another version: it lacks") as told:
        scored.scores()
    assert all(column in str(told.value) for column in LACKING)
    assert "\n" not in str(told.value)
    assert (scored.path / "scores.parquet").read_bytes() == before


def test_parts_of_another_version_are_neither_merged_nor_gone_on_with(scored):
    without(scored.path / "scores" / "part-00001.parquet", LACKING)
    for step in (scored.check_score_parts, scored.merge_scores):
        with pytest.raises(PivotTraceError, match=r"part-00001.*lacks.*mass_mean"):
            step()
    assert not (scored.path / "scores.parquet").exists()


def test_a_damaged_part_is_found_when_its_rows_are_read_which_a_resumed_run_puts_off(scored):
    part = scored.path / "scores" / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:4] + bytes(400) + content[404:])
    scored.check_score_parts()
    with pytest.raises(PivotTraceError, match=r"part-00001\.parquet is not a readable Parquet"):
        scored.merge_scores()
    assert not (scored.path / "scores.parquet").exists()


def test_scores_of_this_version_are_read(scored):
    scored.check_score_parts()
    scored.merge_scores()
    assert scored.scores().num_rows == 6
