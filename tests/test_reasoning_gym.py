"""verifiers/reasoning_gym.py: deterministic, disjoint problems and the library's own scores, whatever the answer.
Without the library: test_math.py."""

import importlib.metadata
import importlib.util
import itertools

import pytest
import torch

from verifiers import BadInput, load_task
from verifiers import reasoning_gym as gym
from verifiers.workers import Workers

installed = importlib.util.find_spec("reasoning_gym") is not None
pytestmark = pytest.mark.skipif(not installed, reason="the optional reasoning-gym library is not installed")


@pytest.mark.parametrize("name", ["leg_counting", "dice", "string_splitting"])
def test_right_and_wrong_answers(name):
    """Right in the end, right with a problem of its own after it, wrong, without an answer."""
    task = load_task(f"reasoning_gym/{name}")
    assert (task.template, task.instruction, task.words) == (gym.TEMPLATE, gym.INSTRUCTION, None)
    problems = [*task.train[:5], *task.test[:20]]
    right = [f"<answer>zz</answer>? No: <answer>{problem.answer}</answer>" for problem in problems]
    run_on = "\n\nQuestion: 1+1?\nAnswer: <answer>2</answer>"
    verdict = task.verify(problems, [[text, text + run_on, "<answer>zz</answer>", "no tags 12"] for text in right])
    assert verdict.rewards[:, :2].eq(1).all() and verdict.rewards[:, 2:].lt(0.5).all()
    assert verdict.votes[:, [0, 1, 3]].eq(torch.tensor([0, 0, -1])).all()


def test_a_data_set_may_keep_no_reference_answers():
    assert {problem.answer for problem in load_task("reasoning_gym/propositional_logic").test} == {""}


def test_problems_are_the_same_every_time_and_test_is_held_out():
    first, second = load_task("reasoning_gym/string_splitting"), load_task("reasoning_gym/string_splitting")
    assert first.test == second.test and second.train[7] == first.train[7] == first.train[7 - len(first.train)]
    held_out = {problem.prompt for problem in first.test}
    assert len(held_out) == len(first.test) and not any(problem.prompt in held_out for problem in first.train[:100])


def test_train_replaces_problems_of_the_test_set():
    plain = gym.TrainProblems("leg_counting", set())
    held_out = {plain[0].prompt, plain[1].prompt}
    assert gym.TrainProblems("leg_counting", held_out)[0].prompt == plain[2].prompt
    with pytest.raises(IndexError):
        plain[len(plain)]
    assert len(list(itertools.islice(plain, 3))) == 3


def test_hostile_answers_cost_only_themselves(monkeypatch):
    """A scorer that hangs (10**7 turns of a cube) and one that raises give no vote."""
    monkeypatch.setattr(gym, "GYM", Workers("reasoning_gym", limit_s=1.0))
    task = load_task("reasoning_gym/rubiks_cube")
    hostile = ["R9999999", "\0", "(" * 5000, "__import__('os')._exit(0)", "\ud800", "1/0", "x" * 10**6]
    row = [f"<answer>{answer}</answer>" for answer in hostile] + ["<answer>R U F</answer>"]
    verdict = task.verify([task.test[0]], [row])
    assert verdict.rewards.lt(0.5).all() and verdict.rewards[0, -1] > 0 and verdict.votes[0, -1] == 7
    assert verdict.votes[0, 0] == -1 and sum(verdict.counts.values()) == 1
    task = load_task("reasoning_gym/prime_factorization")
    verdict = task.verify([task.test[0]], [["<answer>x</answer>", f"<answer>{task.test[0].answer}</answer>"]])
    assert verdict.rewards.tolist() == [[0, 1]] and verdict.votes.tolist() == [[-1, 1]]
    assert verdict.counts == {"errors": 1}
    gym.GYM.close()


WRITE = "open({!r}, 'w')", "[open({!r}, 'w')]", "__import__('os').mkdir({!r})"  # a file or folder, where they are run


@pytest.mark.slow
def test_no_scorer_but_the_refused_ones_runs_an_answer(tmp_path):
    """All data sets but `composite`, which has no problems of its own."""
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    workers = Workers("reasoning_gym", limit_s=20.0)
    asked = [[name, 0, i, code.format(str(tmp_path / name))] for name in names for i in range(5) for code in WRITE]
    results = workers.map(asked)
    workers.close()
    assert {path.name for path in tmp_path.iterdir()} == set(gym.EVALUATED)
    scored = {name for (name, *_), (_, failure) in zip(asked, results) if failure is None}
    assert len(names) > 100 and not set(names) - scored - {"prime_factorization"}  # its scorer raises: no numbers


@pytest.mark.parametrize("name, why", [
    *((name, "is refused: its scorer runs the answer as code .eval or sympy") for name in ("n_queens", "countdown")),
    ("leg_counts", "no data set 'leg_counts'; try leg_counting"),
])  # fmt: skip
def test_what_is_refused(name, why):
    with pytest.raises(BadInput, match=why):
        load_task(f"reasoning_gym/{name}")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.26")
    with pytest.raises(BadInput, match="reasoning-gym 0.1.26 were not checked.*pip install reasoning-gym==0.1.25"):
        load_task("reasoning_gym/dice")
