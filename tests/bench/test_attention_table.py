"""The README says of capture's cost what the committed benchmark measured."""

import json

from tests.bench.attention_table import README, RESULT, tables


def test_the_readme_shows_the_committed_result() -> None:
    assert tables(json.loads(RESULT.read_text())) in README.read_text()


def test_what_was_wanted_and_not_reached_is_said() -> None:
    found = json.loads(RESULT.read_text())
    long = found["decoding"]["float32"]["long"]["modes"]["layers_2"]
    long["speed_over_off"] = 0.5
    assert "0.500 with 2 layers of the long float32 batch (0.95 wanted)" in tables(found)
