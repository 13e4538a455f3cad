"""The recipe of the learning curves, all of it but the engines: policies, scores and verl's log are
made up, everything between them is the recipe's and the commands' own."""

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from recipe_scripts import RECIPES, invent_scores, load, make_model
from typer.testing import CliRunner

from pivottrace_verl.answers import get_answers
from pivottrace_verl.cli import app
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.retriage import RetriageConfig
from pivottrace_verl.retriage_labels import BudgetLeft
from pivottrace_verl.training.data import train_table

run = load("grpo_cpu/run")
arms = load("grpo_cpu/arms")
pairs = load("grpo_cpu/pairs")
teach = load("grpo_cpu/teach")
baseline = load("grpo_cpu/baseline")
curves_table = load("grpo_cpu/curves_table")
picture = load("grpo_cpu/picture")
readme_table = load("readme_table")

SIZE = {
    "policy": [], "teach": [], "pool": ["--three", 30, 6, "--two", 20, 4],
    "rollouts": 8, "probes": 12, "budget": 20,
    "triage": ["--min-spearman", "1e-6", "--alpha", "1"],
    "steps": 4, "every": 2, "batch_size": 4, "samples": 4, "learning_rate": "1e-3",
}  # fmt: skip
SLOPE = {"full": 0.05, "pivottrace": 0.06, "random": 0.02, "votes": -0.01}
"""Made-up accuracy a step."""


def made_up_log(folder: Path, options: list[str], stock: bool) -> None:
    """What verl would have logged."""
    steps = int(options[options.index("--steps") + 1])
    slope = SLOPE[folder.name.rsplit("-", 1)[0]]
    lines = []
    for step in range(steps + 1):
        data: dict[str, float] = {"timing_s/step": 9.0}
        if step and not stock:
            data["pivottrace/curriculum/drawn/annotate"] = 3.0 * step
        if f"trainer.test_freq={SIZE['every']}" in options and step % 2 == 0:
            data["val-core/countdown/acc/mean@4"] = 0.1 + slope * step
            data["val-core/countdown_two/acc/mean@4"] = 0.9
        lines.append(json.dumps({"step": step, "data": data}) + "\n")
    (folder / "train").mkdir()
    (folder / "train" / "metrics.jsonl").write_text("".join(lines))


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


class Played(run.Stages):  # type: ignore[misc, name-defined]
    """The recipe's stages within this process; policies, scores and training are made up."""

    commands: list[list[str]]

    def __call__(self, name: str, *command: str | Path | int) -> None:
        words = [str(word) for word in command]
        line = " ".join(words)
        if line in self.log["finished"]:
            return
        stock = words[:2] == ["env", "PIVOTTRACE_DISABLE=1"]
        program, options = (words[2], words[3:]) if stock else (words[0], words[1:])
        if Path(program).name == "pivottrace":
            self.play(options, stock)
        elif Path(options[0]).name in ("make_policy.py", "teach.py"):
            out = Path(options[options.index("--out") + 1])
            if not out.exists():
                make_model(out)
        else:
            script = Path(options[0]).relative_to(RECIPES).with_suffix("")
            load(str(script)).main(options[1:])
        self.commands.append(words)
        self.log["finished"].append(line)
        self.log["seconds"][name] = 60.0
        self.save()

    def play(self, options: list[str], stock: bool) -> None:
        if options[0] == "score":
            scored = RunDir.open(options[1])
            rows = [
                json.loads(text) for text in (scored.path.parent / "data" / "answers.jsonl").open()
            ]
            by_id = {row["pt_id"]: row["label"] for row in rows}
            invent_scores(
                scored, {p.messages[-1]["content"]: by_id[p.pt_id] for p in scored.pool()}
            )
        elif options[0] == "train":
            made_up_log(Path(options[1]), options, stock)
        else:
            done = CliRunner().invoke(app, options)
            assert done.exit_code == 0, f"{options}\n{done.output}"


@pytest.fixture(scope="module")
def played() -> Iterator[list[list[str]]]:
    """Engines made up; yields the commands run."""
    commands: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Played, "commands", commands, raising=False)
        patch.setattr(run, "Stages", Played)
        patch.setattr(run.PeakMemory, "start", lambda self: None)
        yield commands


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, played: list[list[str]]) -> Path:
    """The whole recipe with two seeds; to be read only."""
    out = tmp_path_factory.mktemp("runs") / "out"
    run.make(out, out / "none", [0, 1], list(arms.ARMS), SIZE)
    return out


@pytest.fixture
def one_arm(tmp_path: Path, played: list[list[str]]) -> Path:
    """Full supervision alone, to be played with."""
    run.make(tmp_path / "out", tmp_path / "none", [0], ["full"], SIZE)
    return tmp_path / "out"


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def trained(commands: list[list[str]], out: Path) -> list[list[str]]:
    """The commands that trained in `out`."""
    return [words for words in commands if "train" in words and str(out) in " ".join(words)]


def test_every_arm_buys_the_labels_its_name_says(done: Path) -> None:
    bought = {
        (row["arm"], row["seed"]): row["labels"]["bought"] for row in summary_of(done)["arms"]
    }
    assert len(bought) == 2 * len(arms.ARMS)
    for (arm, _), n in bought.items():
        assert n == {"full": 50, "random": 20, "pivottrace": 20, "votes": 0}[arm]
    rows = {arm: train_table(RunDir.open(done / f"{arm}-0")).num_rows for arm in arms.ARMS}
    assert (rows["full"], rows["random"], rows["votes"]) == (50, 20, 50)


def test_random_labels_move_with_the_seed_and_so_do_the_probes(done: Path) -> None:
    for arm in ("random", "pivottrace"):
        first, second = (RunDir.open(done / f"{arm}-{seed}").ledger().labels() for seed in (0, 1))
        assert set(first) != set(second)


def test_training_differs_between_arms_in_the_switch_and_in_stock_verls_order_only(
    done: Path, played: list[list[str]]
) -> None:
    rest = set()
    for words in trained(played, done):
        stock = "PIVOTTRACE_DISABLE=1" in words
        assert stock == arms.ARMS[Path(words[words.index("train") + 1]).name[:-2]].stock
        assert stock == ("data.shuffle=true" in words)
        options = words[words.index("train") + 2 :]
        del options[options.index("--seed") : options.index("--seed") + 2]
        rest.add(tuple(word for word in options if not word.startswith("data.")))
    assert len(rest) == 1


def test_a_finished_arm_is_not_trained_again_and_others_join_it(
    one_arm: Path, played: list[list[str]]
) -> None:
    first = trained(played, one_arm)
    before = summary_of(one_arm)["arms"]
    run.make(one_arm, one_arm / "none", [0], ["full", "votes"], SIZE)
    assert [words[-1] for words in first] == ["data.seed=0"]
    assert len(trained(played, one_arm)) == 2
    after = summary_of(one_arm)["arms"]
    assert [row["arm"] for row in after] == ["full", "votes"]
    assert after[:1] == before


def test_an_arm_killed_before_its_result_was_kept_is_not_trained_again(
    one_arm: Path, played: list[list[str]]
) -> None:
    result = one_arm / "arms" / "full-0.json"
    before = result.read_text()
    result.unlink()
    run.make(one_arm, one_arm / "none", [0], ["full"], SIZE)
    assert result.read_text() == before
    assert len(trained(played, one_arm)) == 1


def test_results_of_other_settings_are_refused_by_name(one_arm: Path) -> None:
    with pytest.raises(PivotTraceError, match=r"full-0\.json .*steps: 4 then, 6 now.*--out"):
        run.make(one_arm, one_arm / "none", [0], ["full"], {**SIZE, "steps": 6})


def test_a_missing_validation_is_refused_and_the_sentences_way_out_works(one_arm: Path) -> None:
    metrics = one_arm / "full-0" / "train" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    (one_arm / "arms" / "full-0.json").unlink()
    with pytest.raises(PivotTraceError, match=r"no validation .* at step 4: remove the arm"):
        run.make(one_arm, one_arm / "none", [0], ["full"], SIZE)
    shutil.rmtree(one_arm / "full-0")
    run.make(one_arm, one_arm / "none", [0], ["full"], SIZE)
    assert len(summary_of(one_arm)["arms"][0]["curve"]) == 3


def test_a_baseline_of_more_labels_than_prompts_is_refused(done: Path) -> None:
    with pytest.raises(PivotTraceError, match=r"51 labels .* has 50 prompts"):
        baseline.plan(RunDir.open(done / "full-0"), 51, "drop", 0)


def test_the_trainer_finds_no_budget_left_in_the_plan_of_a_baseline(done: Path) -> None:
    for arm in ("random", "votes"):
        trained_run = RunDir.open(done / f"{arm}-0")
        assert BudgetLeft(trained_run, trained_run.ledger(), RetriageConfig()).now() == 0


def test_labels_are_asked_for_as_prompts_come_up_and_probes_before_training(done: Path) -> None:
    curves = {row["arm"]: row["curve"] for row in summary_of(done)["arms"] if row["seed"] == 0}
    asked = {arm: [point["labels"] for point in curve] for arm, curve in curves.items()}
    assert asked["full"] == [0, 8, 16]
    assert asked["pivottrace"] == [12, 18, 20]
    assert asked["votes"] == [0, 0, 0]


def test_the_table_says_who_reached_full_supervision_and_who_lost(done: Path) -> None:
    made = curves_table.tables(summary_of(done))
    cells: dict[str, list[str]] = {}
    for line in made.splitlines():
        if line.startswith("| "):
            name, *rest = line.strip("| ").split(" | ")
            cells.setdefault(name, rest)
    # Final: mean of steps 2 and 4, so .25 for full supervision, which both reach by step 4 only.
    assert cells["all labels, stock verl"][1:5] == ["25.0%, 25.0%", "90%, 90%", "4", "16"]
    assert cells["PivotTrace"] == ["20 (40%)", "28.0%, 28.0%", "90%, 90%", "4", "20", "1.0, 1.0"]
    assert cells["no labels, votes only"][1:5] == ["7.0%, 7.0%", "90%, 90%", "-", "-"]
    assert "at the end: +3.0, +3.0 points by seed, ahead" in made


def test_what_lies_within_the_measurements_noise_is_called_level() -> None:
    def arm(name: str, values: list[float]) -> dict[str, Any]:
        points = [{"step": i, "labels": 0, "three": v, "two": 1.0} for i, v in enumerate(values)]
        labels = {"bought": 1, "probes": 0, "share": 0.1}
        return {
            "arm": name, "seed": 0, "labels": labels, "routes": {}, "estimator": None,
            "curve": points, "seconds": 60.0,
        }  # fmt: skip

    summary = {"arms": [arm("pivottrace", [0.10, 0.3, 0.3]), arm("random", [0.14, 0.33, 0.33])]}
    text = " ".join(curves_table.sentences(summary))
    assert "up to 4.0 points" in text
    assert "-3.0 points by seed, level" in text
    summary["arms"][1]["curve"][0]["three"] = 0.11
    assert "-3.0 points by seed, behind" in " ".join(curves_table.sentences(summary))


def test_the_picture_is_one_svg_with_a_line_for_every_arm_and_seed(done: Path) -> None:
    root = ET.fromstring((done / "curves.svg").read_bytes())
    classes = [node.get("class", "") for node in root.iter()]
    for arm in arms.ARMS:
        assert classes.count(f"line seed {arm}") == 2 * 2
        # Two panels and the legend.
        assert classes.count(f"line {arm}") == 3
    assert ET.fromstring(picture.picture({"arms": summary_of(done)["arms"][:1]})) is not None


def test_the_readme_takes_a_result_with_its_table_and_picture(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "recipe"
    here.mkdir()
    (here / "README.md").write_text((RECIPES / "grpo_cpu" / "README.md").read_text())
    monkeypatch.setattr(curves_table, "HERE", here)
    curves_table.main(["--take", str(done), "--write"])
    assert curves_table.for_readme(summary_of(done)) in (here / "README.md").read_text()
    assert (here / "results" / "curves.svg").read_bytes() == (done / "curves.svg").read_bytes()


def test_problems_with_two_numbers_are_distinct_and_their_worked_solution_is_right() -> None:
    problems = pairs.problems(0)
    assert len({problem.key for problem in problems}) == len(problems) == 310
    kind = get_answers("expression")
    for problem in random.Random(0).sample(problems, 40):
        text = pairs.worked_solution(problem)
        answer = text.split("<answer>")[1].removesuffix("</answer>")
        assert kind.canonical(answer) == pairs.tasks.label(problem)
    assert problems != pairs.problems(1)


def test_the_policy_is_taught_solutions_and_not_prompts() -> None:
    tokenizer = teach.make_policy.build_tokenizer()
    tokens, targets = next(teach.pair_batches(tokenizer, 5, 0))
    wanted = targets != -100
    for row in range(5):
        said = tokenizer.decode(targets[row][wanted[row]])
        assert said.endswith("</answer> <|end|>") and said.count("<answer>") == 1
        assert tokenizer.decode(tokens[row][~wanted[row]][:-1]).startswith("<|user|> Calculate")
        # A target is the token that follows.
        first = int(wanted[row].nonzero()[0])
        assert targets[row][first] == tokens[row][first + 1]


def test_pool_and_validation_share_no_prompt_and_the_policys_mix_is_in_both(done: Path) -> None:
    manifest = json.loads((done / "scored" / "manifest.json").read_text())
    assert manifest["val"]["also_in_pool"] == 0
    for name, (three, two) in {"pool": (30, 20), "val": (6, 4)}.items():
        found = [row["data_source"] for row in json_lines(done / "data" / f"{name}.jsonl")]
        assert (found.count("countdown"), found.count("countdown_two")) == (three, two)


def test_the_committed_result_is_what_the_readme_shows() -> None:
    result = RECIPES / "grpo_cpu" / "results" / "summary.json"
    readme = (RECIPES / "grpo_cpu" / "README.md").read_text()
    if result.exists():
        assert curves_table.for_readme(json.loads(result.read_text())) in readme
    else:
        assert "Not measured yet." in readme
    assert math.isclose(run.FULL["budget"] / 640, 0.35)
