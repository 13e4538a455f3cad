"""Countdown problems and their worked solutions."""

import random
from dataclasses import replace

import pytest
import tasks

from pivottrace_verl.answers import correct, get_answers

KIND = get_answers(tasks.ANSWERS)
TIRELESS = replace(tasks.careful(tasks.Carelessness()), patience=10**6)


@pytest.fixture(scope="module")
def problems():
    return tasks.draw(120, seed=5, for_training=False)


def texts(problems, carelessness, n=1, seed=0):
    rng = random.Random(seed)
    return [
        [tasks.worked_solution(problem, rng, carelessness) for _ in range(n)]
        for problem in problems
    ]


def share_right(problems, carelessness, n=8):
    right = [
        correct(KIND.extract(text), tasks.label(problem), KIND)
        for problem, group in zip(problems, texts(problems, carelessness, n), strict=True)
        for text in group
    ]
    return sum(right) / len(right)


def test_a_label_evaluates_to_its_target_and_uses_each_number_once(problems):
    for problem in problems:
        label = tasks.label(problem)
        assert eval(label) == pytest.approx(problem.target)  # noqa: S307
        used = label.replace("(", " ").replace(")", " ")
        for op in "+-*/":
            used = used.replace(op, " ")
        assert sorted(map(int, used.split())) == sorted(problem.numbers)


def test_a_problem_with_two_solutions_is_not_solvable():
    # 2 * 3 + 1 has a sibling for none, but 2, 2, 4 make 4 in more than one way.
    assert not tasks.solvable(tasks.Instance((2, 2, 4), 4))
    assert not tasks.solvable(tasks.Instance((5, 1, 7), 35))  # 5 * 7 * 1 = 5 * 7 / 1


def test_orderings_and_groupings_of_a_sum_count_as_one_solution():
    assert tasks.solutions((4, 7, 11))[14] == {"7+11-4"}


def test_a_problem_that_needs_fractions_is_not_solvable():
    # 7 / (3 / 12) is 7 * 12 / 3 and stays; no order of steps spares a fraction here.
    assert not any(tasks.solvable(tasks.Instance((3, 5, 7), target)) for target in (0, 1000, -4))


def test_training_and_held_out_problems_are_disjoint(problems):
    shown = tasks.draw(120, seed=5, for_training=True)
    assert not {p.key for p in shown} & {p.key for p in problems}
    assert len({p.key for p in problems}) == len(problems)


def test_drawing_is_reproducible(problems):
    assert tasks.draw(120, seed=5, for_training=False) == problems


def test_asking_for_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="new problems, not 40"):
        tasks.draw(40, seed=0, for_training=True, tries=20)


def test_a_tireless_careful_search_is_always_right(problems):
    assert share_right(problems, TIRELESS, n=1) == 1.0


def test_every_equation_of_a_careful_search_holds(problems):
    for (text,) in texts(problems, TIRELESS):
        search = text.split("<answer>")[0]
        for word in ("yes", "no", "back", "guess"):
            search = search.replace(word, ",")
        equations = [part for part in search.split(",") if part.strip()]
        assert equations
        for equation in equations:
            left, right = equation.split("=")
            assert eval(left) == int(right)  # noqa: S307


def test_the_demonstrator_is_careless_but_more_often_right_than_wrong(problems):
    assert 0.5 < share_right(problems, tasks.Carelessness()) < 0.85


def test_every_worked_solution_has_a_parseable_answer(problems):
    for group in texts(problems, tasks.Carelessness(), n=4):
        assert all(KIND.extract(text) is not None for text in group)


def test_longer_searches_are_wrong_more_often(problems):
    searching = replace(tasks.Carelessness(), hasty=0.0)
    rows = [
        (len(text.split()), correct(KIND.extract(text), tasks.label(problem), KIND))
        for problem, group in zip(problems, texts(problems, searching, n=8), strict=True)
        for text in group
    ]
    rows.sort()
    third = len(rows) // 3
    short, long = rows[:third], rows[-third:]
    assert sum(ok for _, ok in short) > sum(ok for _, ok in long) + third // 10
