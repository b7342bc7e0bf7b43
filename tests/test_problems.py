"""harness/problems.py: which problems a step and an evaluation read."""

from harness.problems import evaluation_problems, training_batch
from verifiers import Problem


def test_training_batches_see_every_problem_once_a_pass():
    problems = list(range(10))
    batches = [training_batch(problems, step, 4, seed=0) for step in range(5)]
    assert sorted(sum(batches, [])[:10]) == problems and sorted(sum(batches, [])[10:]) == problems
    assert batches == [training_batch(problems, step, 4, seed=0) for step in range(5)]
    assert batches != [training_batch(problems, step, 4, seed=1) for step in range(5)]


def test_evaluation_problems_are_spread_over_levels():
    problems = [Problem(str(i), "", level=i % 3 or None) for i in range(30)]
    chosen = evaluation_problems(problems, 4)
    assert [sum(p.level == level for p in chosen) for level in (1, 2, None)] == [4, 4, 4]
    assert chosen == evaluation_problems(problems, 4)
