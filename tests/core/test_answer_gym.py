"""reasoning-gym's own scorers as an answers kind."""

import pytest

from pivottrace_verl import answer_pool
from pivottrace_verl.answers import Grade, cluster, get_answers, grade_many
from pivottrace_verl.errors import PivotTraceError

reasoning_gym = pytest.importorskip("reasoning_gym")
TASKS = ["chain_sum", "gsm_symbolic", "countdown", "knights_knaves", "lcm"]


@pytest.fixture(autouse=True, scope="module")
def one_worker():
    answer_pool.set_limits(answer_pool.Limits(workers=1, seconds=20))
    yield
    answer_pool.close()


@pytest.mark.parametrize("task", TASKS)
def test_the_generators_answers_are_right_and_those_to_other_entries_as_the_scorer_says(task):
    kind = get_answers(f"reasoning_gym:{task}")
    dataset = reasoning_gym.create_dataset(task, seed=7, size=12)
    entries = [dataset[i] for i in range(12)]
    answers = [kind.extract(f"well <answer>{entry['answer']}</answer>.") for entry in entries]
    labels = [entry["answer"] for entry in entries]
    assert grade_many(kind, list(zip(answers, labels, strict=True))) == [Grade.RIGHT] * 12
    others = answers[1:] + answers[:1]
    scored = [
        Grade.RIGHT if dataset.score_answer(answer, entry) == 1.0 else Grade.WRONG
        for answer, entry in zip(others, entries, strict=True)
    ]
    assert grade_many(kind, list(zip(others, labels, strict=True))) == scored


def test_two_expressions_that_reach_the_target_with_the_same_numbers_are_one_answer():
    kind = get_answers("reasoning_gym:countdown")
    vote = cluster(["3*(4+5)", "(5+4)*3", "3*4+3*5", "4*5+3+4", "27", None], kind)
    assert vote.clusters == [("(5+4)*3", 2), ("27", 1), ("3*4+3*5", 1), ("4*5+3+4", 1)]
    assert kind.equal("(1+5)*(2+2)", "2*(1+5)*2")
    assert kind.equal("5*5-1", "(5-1/5)*5") is False
    assert kind.equal("6/2+1*8", "8+1*6/2")


@pytest.mark.parametrize(
    "answer",
    [
        *("__import__('os').system('true')", "2**9**9", "9//2", "(1+2", "1/0", "1+2=3", "", "x+1"),
        "1+" * 300 + "1",
    ],
)
def test_what_is_not_plain_arithmetic_never_reaches_a_scorer_that_evaluates_it(answer):
    kind = get_answers("reasoning_gym:countdown")
    assert kind.canonical(answer) is None
    assert kind.equal(answer, "3") is False


def test_a_role_for_everybody_is_one_answer_in_any_order_and_prose_is_none():
    kind = get_answers("reasoning_gym:knights_knaves")
    assert kind.equal(
        "Zoey is a knight, and Riley is a knave.", "Riley is a knave, Zoey is a knight"
    )
    assert kind.equal("Zoey is a knight", "Zoey is a knave") is False
    assert kind.extract("<answer>I cannot tell</answer>") is None


def test_an_answer_without_a_mark_is_unparseable():
    kind = get_answers("reasoning_gym:chain_sum")
    assert kind.extract("the sum must be 12") is None
    assert kind.extract("Answer: 1,012.0") == "1012"
    assert kind.extract("<answer>twelve</answer>") is None
    assert kind.extract("<answer>NaN</answer>") is None


def test_gsm_symbolics_own_scorer_reads_no_minus_sign_and_stops_at_a_comma():
    kind = get_answers("reasoning_gym:gsm_symbolic")
    assert kind.canonical("-5") == "5"
    assert kind.canonical("$1,000") == "1"
    assert kind.equal("18", "18.00 dollars")


@pytest.mark.parametrize(
    ("task", "why"),
    [("sudoku", "reads more of the generator's entry"), ("no_such", "has no such task")],
)
def test_a_task_that_cannot_be_scored_without_its_entry_is_refused(task, why):
    with pytest.raises(PivotTraceError, match=why):
        get_answers(f"reasoning_gym:{task}")
