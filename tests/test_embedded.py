"""The embedded tasks, and the tiny policy that is warm-started on them."""

import dataclasses
import random
import re
import threading

import pytest
import torch
from runs import weights_of
from transformers import AutoTokenizer

import common
import harness.policy
from harness.policy import cached_folder
from verifiers import Problem, Task, arithmetic, load_task
from verifiers.arithmetic import FACTORS, SUMS, verify


@pytest.mark.parametrize("name, size_of_level_3", [("arithmetic", 90 * 21), ("sums", 90 * 8)])
def test_problems_are_right_and_a_fifth_of_all_pairs_is_held_out_in_both_orders(name, size_of_level_3, monkeypatch):
    """47*85 in training would tell the answer to 85*47."""
    monkeypatch.setattr(arithmetic, "TRAIN_PER_LEVEL", 6000)
    task = arithmetic.load.__wrapped__(name)
    levels, sides, third = (SUMS if name == "sums" else FACTORS), [], []
    for problems in (task.train, task.test):
        found = {problem: re.search(r"(\d+) ?([*+]) ?(\d+)[=?]$", problem.prompt).groups() for problem in problems}
        for problem, (a, operation, b) in found.items():
            value = int(a) + int(b) if operation == "+" else int(a) * int(b)
            assert problem.answer == problem.solution == str(value)
            form, first, second = levels[problem.level]
            assert operation == form and int(a) in first and int(b) in second
        assert {problem.level for problem in problems} == {*levels}
        sides.append({*found.values()})
        third.append(sum(problem.level == 3 for problem in found))  # a level that is here in full
    train, test = ({(operation, *sorted((a, b))) for a, operation, b in side} for side in sides)
    assert not train & test and any(a != b and (b, operation, a) in sides[1] for a, operation, b in sides[1])
    assert sum(third) == size_of_level_3 and 0.16 < third[1] / sum(third) < 0.24
    assert len({sum(problem.level == level for problem in task.train) for level in levels}) == 1


def test_the_answer_to_sums_is_the_last_number_whatever_stands_around_it():
    problem = Problem("What is 5 + 7?", "12", "12", 1)
    right = ["12", " 12.\n", "012", "5 + 7 = 12", "It is **12**, not 13 but 12!", "12 apples", "12\0"]
    wrong = ["13", "-12", "12.5", "3,12", "1" * 10**6, "12 = 5 + 7", "1.2" * 10**5]
    none = ["", ".", "twelve", "٣", "-" * 10**6]
    verdict = load_task("sums").verify([problem], [[*right, *wrong, *none]])
    assert verdict.rewards.tolist() == [[1.0] * len(right) + [0.0] * (len(wrong) + len(none))]
    n = len(right)
    assert verdict.votes.tolist() == [[0] * n + list(range(n, n + len(wrong))) + [-1] * len(none)]


def small_task(steps: int = 3) -> Task:
    problems = [Problem(f"{a}+{b}=", str(a + b), str(a + b)) for a in range(5) for b in range(5)]
    return Task("sums", problems, problems, verify, warm_start={"steps": steps, "batch": 8, "lr": 1e-2})


def test_the_tokenizer_is_one_token_a_character_and_loses_nothing(tmp_path):
    tokenizer = harness.policy.tiny_tokenizer()
    text = " 47*85=\n" + "".join(map(chr, range(32, 127))) + "  "
    assert len(tokenizer(text).input_ids) == len(text) and tokenizer.decode(tokenizer(text).input_ids) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == tokenizer(text).input_ids and again.decode(again(text).input_ids) == text
    assert again.eos_token_id == 1 and again("é").input_ids == [again.unk_token_id]


def test_warm_start_is_deterministic_cached_and_named_by_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    torch.manual_seed(1)
    folder = harness.policy.tiny_policy_folder(small_task())
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.is_relative_to(tmp_path / "a") and harness.policy.tiny_policy_folder(small_task()) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert harness.policy.tiny_policy_folder(small_task(steps=4)) != folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    torch.manual_seed(2)  # the global state does not matter, and is left alone
    state = torch.get_rng_state()
    assert torch.equal(weights_of(harness.policy.tiny_policy_folder(small_task())), weights_of(folder))
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.5e6 < len(weights_of(folder)) < 1.5e6


def test_a_group_of_solutions_weighs_as_much_as_one(noted):
    """Each of m solutions has 1/m. The loss is a mean over tokens: weights times lengths add up to the prompts."""
    groups = [[Problem("1+1=", "2", "2"), Problem("1+1=", "2", "0002")], [Problem("2+3=", "5", "5")]]
    task = dataclasses.replace(small_task(steps=2), warm_start_problems=groups)
    seen = noted(common, "accumulate_gradient", lambda policy, experts, weights: (experts, weights))
    harness.policy.warm_start(task)
    assert len(seen) == 2 and all(len(experts.prompts) == 8 for experts, _ in seen)
    for experts, weights in seen:
        lengths = experts.mask.sum(-1)  # (8, m), end tokens counted: 2 and 5, or 2 alone
        shares = torch.where(lengths[:, -1:] == 5, torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
        torch.testing.assert_close(weights, shares * 8 / (shares * lengths).sum())
        assert {tuple(row) for row in lengths.tolist()} == {(2, 5), (2, 0)}


def test_slips_are_random_digits_at_a_rate():
    problem = Problem("?", "", "47,85" * 400)
    assert harness.policy.with_slips(problem, 0.0, random.Random(0)) == problem
    slipped = harness.policy.with_slips(problem, 0.15, random.Random(0)).solution
    assert [c for c in slipped if not c.isdigit()] == [","] * 400 and len(slipped) == 2000
    changed = sum(a != b for a, b in zip(slipped, problem.solution))
    assert changed / 1600 == pytest.approx(0.15 * 0.9, abs=0.03)  # one in ten is the digit that was there


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonal_moves_singular_values_near_one_and_keeps_their_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    found = harness.policy.orthogonal(matrix) / max(1, shape[0] / shape[1]) ** 0.5
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    moved = U.T @ found @ V.T  # (16, 16): diagonal, if the directions are kept
    assert S.max() > 2 * S.min() and (moved - moved.diag().diag()).abs().max() < 1e-4
    assert moved.diag().min() > 0.6 and moved.diag().max() < 1.3


def test_a_race_for_the_cache_leaves_one_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    barrier, folders = threading.Barrier(2), []

    def write(folder):
        folder.mkdir()
        (folder / "weights").write_text("whole")
        barrier.wait(60)  # both have written it, then both put it in its place

    threads = [threading.Thread(target=lambda: folders.append(cached_folder("a", write))) for _ in "ab"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert folders == [tmp_path / "inference-aware-rl" / "a"] * 2
    assert [str(path.relative_to(folders[0].parent)) for path in folders[0].parent.rglob("*")] == ["a", "a/weights"]
