"""The task `suspects`, what theory says of it, and the exact evaluation, each against enumeration or search."""

import dataclasses
import functools
import itertools
import json
import math
from functools import partial

import exact
import optima
import pytest
import torch
from enumeration import best_of_value, majority_value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import harness.policy
from verifiers import Problem, load_task, suspects

task_of = functools.cache(load_task)
Q, WEIGHTS, LEVELS = optima.held_out()


# --- the task --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, expected", [("suspects", [0.49, 1, 0.7]), ("suspects_uniform", [1, 1, 1])])
def test_the_posterior_is_by_the_weights_of_those_listed(name, expected):
    """Sam, Tom and Eve are the third, the first and the second: .49, 1 and .7, over their sum."""
    prompt = "Sam Tom Eve:"
    assert suspects.listed(prompt) == ["Sam", "Tom", "Eve"] and len(set(suspects.NAMES)) == 16
    row = suspects.posterior([prompt], name)[0].tolist()
    assert row == pytest.approx([x / sum(expected) for x in expected] + [0] * 5)


@pytest.mark.parametrize("name", ["suspects", "suspects_uniform"])
def test_problems_are_drawn_as_the_task_says_and_the_split_is_by_set(name):
    task = task_of(name)
    assert (task.train, task.test) == (suspects.training_problems(name), suspects.spread_problems(name))
    some = sum(task.warm_start_problems[::50], ())
    for held_out, problems in (False, task.train[::7]), (True, task.test), (False, some):
        for problem in problems:
            names = suspects.listed(problem.prompt)
            assert suspects.is_held_out(names) == held_out == suspects.is_held_out(names[::-1])
            assert problem.answer == problem.solution in names and problem.level == len(set(names)) == len(names)
    assert [sum(problem.level == level for problem in task.train) for level in range(2, 9)] == [4_000] * 7
    assert len(task.warm_start_problems) == len(task.train)
    for problem, group in list(zip(task.train, task.warm_start_problems))[::7]:  # all candidates, and the prompt once
        assert {x.prompt for x in group} == {problem.prompt}
        assert [x.solution for x in group] == suspects.listed(problem.prompt)
    for side, tolerance in ((task.train, 0.01), (task.test, 0.03)):
        q = suspects.posterior([problem.prompt for problem in side], name)
        place = torch.tensor([suspects.listed(problem.prompt).index(problem.answer) for problem in side])
        seen, expected = q.gather(1, place[:, None]).mean().item(), q.square().sum(-1).mean().item()
        assert seen == pytest.approx(expected, abs=tolerance)


def test_a_fifth_of_all_sets_is_held_out_and_those_evaluated_are_spread_evenly():
    counts = {m: [len(suspects.all_sets(side)[m]) for side in (True, False)] for m in suspects.LEVELS}
    assert sum(map(sum, counts.values())) == 39_186 and 0.19 < sum(a for a, _ in counts.values()) / 39_186 < 0.21
    assert counts[2] == [24, 96]
    problems = optima.problems_of()
    assert problems == task_of("suspects").test and len({problem.prompt for problem in problems}) == 48 + 6 * 50
    pairs = [problem.prompt[:-1].split() for problem in problems if problem.level == 2]
    assert len(pairs) == 48 and all(pair[::-1] in pairs for pair in pairs)  # all their orders
    every = suspects.posterior([" ".join(names) + ":" for m in (5, 8) for names in suspects.all_sets(True)[m]])
    for level in (5, 8):
        some = every[(every > 0).sum(-1) == level].amax(-1).mean().item()
        assert Q[LEVELS == level].amax(-1).mean().item() == pytest.approx(some, abs=0.005)
    # The hidden answers are as they should be: pass@k of the best policy on them is nearly its expectation.
    place = torch.tensor([problem.prompt[:-1].split().index(problem.answer) for problem in problems])
    for k in (1, 4, 8):
        pi = suspects.best_policy(Q, k)
        seen = 1 - (1 - pi.gather(1, place[:, None])[:, 0]) ** k
        assert (WEIGHTS @ seen).item() == pytest.approx((WEIGHTS @ optima.pass_at_k(Q, pi, k)).item(), abs=0.008)


def test_a_pretrained_model_reads_words_and_a_tokenizer_of_characters_the_list():
    assert suspects.in_words("Eve Tom Ann:") == "Choose one of Eve, Tom, Ann: I choose"
    task, problem = task_of("suspects"), Problem("Eve Tom:", "Tom", "Tom", 2)
    characters = harness.policy.tiny_tokenizer()
    assert harness.policy.texts_read(characters, task, [problem]) == (["Eve Tom:"], [""])
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert harness.policy.texts_read(words, task, [problem]) == (["Choose one of Eve, Tom: I choose"], [" "])


def test_verdicts_on_right_wrong_and_hostile_responses():
    problem = Problem("Eve Tom Ann:", "Tom", "Tom", 3)
    right, wrong = ["Tom", " Tom", "Tom\n"], ["Eve", "Zoe", " Eve"]
    malformed = ["", "tom", "TOM", "Tom.", "Tom Eve", "Tom,", "T om", "Tomx", "Tom\0", "Тоm", "Tom" * 10**6]
    malformed += ["I choose Tom"]
    verdict = suspects.verify([problem], [right + wrong + malformed])
    assert verdict.rewards.tolist() == [[1.0] * 3 + [0.0] * (len(wrong) + len(malformed))]
    assert verdict.votes[0].tolist() == [0, 0, 0, 3, 4, 3] + [-1] * len(malformed)
    verdict = suspects.verify([problem, Problem("Ann Eve:", "Eve", "", 2)], [["Tom", "Eve"]] * 2)
    assert verdict.rewards.tolist() == [[1, 0], [0, 1]] and verdict.votes.tolist() == [[0, 1], [0, 1]]


# --- the best policies -----------------------------------------------------------------------------------------------
def test_the_best_pass_at_k_that_the_task_says_is_that_of_the_best_policy():
    task, problems = task_of("suspects"), optima.problems_of()
    for k in (1, 8):
        torch.testing.assert_close(task.best(problems, k), optima.pass_at_k(Q, suspects.best_policy(Q, k), k))
    with pytest.raises(ValueError, match="at least 1"):
        task.best(problems, 0)
    uniform = task_of("suspects_uniform").best(problems, 2)
    assert uniform.tolist() == pytest.approx([(2 - 1 / m) / m for m in LEVELS.tolist()])  # 1 - (1 - 1/m)^2


def kl_to_uniform(pi):
    return torch.special.xlogy(pi, pi * LEVELS.unsqueeze(-1)).sum(-1)


pass_at = partial(optima.pass_at_k, Q)
UNIFORM = optima.uniform(Q)
OPTIMA = {
    "pass@8": (lambda pi: pass_at(pi, 8), lambda: suspects.best_policy(Q, 8)),
    "SFT": (lambda pi: torch.special.xlogy(Q, pi).sum(-1), lambda: Q),
    "BoN-SFT": (lambda pi: torch.special.xlogy(Q, 1 - (1 - pi) ** 8).sum(-1), lambda: optima.bon_sft_policy(Q, 8)),
    "MaxRL": (lambda pi: sum(pass_at(pi, j) / j for j in range(1, 16)), lambda: optima.maxrl_policy(Q, 16)),
    "frontier": (lambda pi: 0.3 * pass_at(pi, 1) + 0.7 * pass_at(pi, 8), lambda: optima.frontier_policy(Q, 0.3, 8)),
    "frontier, nearly straight": (lambda pi: 0.9 * pass_at(pi, 1) + 0.1 * pass_at(pi, 32),
                                  lambda: optima.frontier_policy(Q, 0.9, 32)),
    "mean - beta KL": (lambda pi: (Q * pi).sum(-1) - 0.5 * kl_to_uniform(pi),
                       lambda: optima.mean_kl_policy(Q, 0.5, UNIFORM)),
    "maj@4 - beta KL": (lambda pi: optima.maj_at_k(Q, pi, 4) - 0.5 * kl_to_uniform(pi),
                        lambda: optima.majority_kl_policy(Q, 0.5, UNIFORM, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMA)
def test_each_optimum_is_stationary_and_above_its_neighbours(name):
    """On the support the slopes are equal, elsewhere they are no higher; and no policy near it or far off has more."""
    objective, optimum = OPTIMA[name][0], OPTIMA[name][1]()
    torch.testing.assert_close(optimum.sum(-1), torch.ones(len(Q)).double())
    pi = optimum.clamp(min=1e-12).requires_grad_()
    (slope,) = torch.autograd.grad(objective(pi).sum(), pi)
    inside = optimum > 1e-9
    multiplier = (slope * optimum).sum(-1, keepdim=True)
    torch.testing.assert_close(slope.where(inside, multiplier), multiplier.expand_as(slope), atol=1e-5, rtol=1e-5)
    assert (slope.where((Q > 0) & ~inside, -torch.inf) <= multiplier + 1e-6).all()
    normal = torch.randn(2 if "maj" in name else 100, *Q.shape, generator=torch.Generator().manual_seed(0)).double()
    logits = torch.linspace(0, 6, len(normal)).view(-1, 1, 1) * normal  # (100, P, 8), of any sharpness
    others = logits.where(Q > 0, -torch.inf).softmax(-1)
    for share in (1.0, 0.1, 0.01):
        assert (objective((1 - share) * optimum + share * others) <= objective(optimum) + 1e-9).all()


def test_the_committed_predictions_are_what_theory_says():
    saved, computed = json.loads(optima.PREDICTIONS.read_text()), optima.predictions()
    assert [row["what"] for row in saved["claims"]] == [row["what"] for row in computed["claims"]]
    assert {row["claim"] for row in saved["claims"]} == {*"B1 B2 B3 M1 M2 M3 M4 M5 C1 C2 C3 C4 C5 E1 E2 E3 E4".split()}
    for a, b in zip(saved["claims"], computed["claims"]):
        assert a["predicted"] == (b["predicted"] if b["predicted"] is None else pytest.approx(b["predicted"], abs=2e-4))
    assert saved["policies"].keys() == computed["policies"].keys()
    for name, row in computed["policies"].items():
        assert saved["policies"][name] == pytest.approx(row, abs=2e-4)


# --- metrics ---------------------------------------------------------------------------------------------------------
PARTIAL = torch.tensor([0.5, 0.15, 0.05, 0, 0, 0, 0, 0]).double()  # .3 elsewhere
THREE = torch.tensor([0.6, 0.3, 0.1, 0, 0, 0, 0, 0]).double()
SCORES = torch.tensor([0.2, 0.9, 0.2, 1, 1, 1, 1, 1]).double()  # two candidates tie


def expected_value(value, k: int) -> float:
    """E[value((score, reward) of each of k tries of PARTIAL, their votes)], the hidden answer drawn from THREE, by
    enumeration; tries are candidates 0 to 2, and 3 for elsewhere, which scores lowest and agrees with nothing."""
    total, chances, scores = 0.0, [*PARTIAL[:3].tolist(), 0.3], [*SCORES[:3].tolist(), -1.0]
    for hidden, *tries in itertools.product(range(3), *[range(4)] * k):
        rewards, votes = [float(y == hidden) for y in tries], [y if y < 3 else 3 + i for i, y in enumerate(tries)]
        chance = THREE[hidden].item() * math.prod(chances[y] for y in tries)
        total += chance * value([(scores[y], reward) for y, reward in zip(tries, rewards)], votes)
    return total


@pytest.mark.parametrize("k", (1, 2, 3, 5))
def test_metrics_of_a_policy_are_their_expectations(k):
    rows = THREE.expand(2, 8), PARTIAL.expand(2, 8)
    passed = expected_value(lambda pairs, _: max(reward for _, reward in pairs), k)
    majority = expected_value(lambda pairs, votes: majority_value([(v, r) for v, (_, r) in zip(votes, pairs)]), k)
    best = expected_value(lambda pairs, _: best_of_value(pairs), k)
    assert optima.pass_at_k(*rows, k).tolist() == pytest.approx([passed] * 2)
    assert optima.maj_at_k(*rows, k).tolist() == pytest.approx([majority] * 2)
    assert optima.best_of_n(*rows, SCORES.expand(2, 8), k).tolist() == pytest.approx([best] * 2)


def test_exact_metrics_of_a_prompt_by_hand():
    """Of Tom, Eve and Sam q is 1, .7 and .49 over 2.19."""
    base = torch.tensor([0.25, 0.25, 0.25, 0, 0, 0, 0, 0]).double()
    problems = [Problem("Tom Eve Sam:", "Tom")] * 2
    metrics = exact.exact_metrics(torch.stack([PARTIAL, base]).log(), problems, base.log().expand(2, 8))
    assert metrics["elsewhere"].tolist() == pytest.approx([0.3, 0.25])
    assert metrics["pass@2"][0].item() == pytest.approx((0.75 + 0.7 * 0.2775 + 0.49 * 0.0975) / 2.19)  # 1 - (1 - pi)^2
    kl = 0.5 * math.log(2) + 0.15 * math.log(0.6) + 0.05 * math.log(0.2) + 0.3 * math.log(1.2)  # elsewhere counts
    assert metrics["kl"].tolist() == pytest.approx([kl, 0], abs=1e-6) and "maj@8" in metrics


def test_the_frontier_goes_from_the_best_for_many_tries_to_the_best_for_one():
    """By way of `frontier_policy`, which is an optimum: see OPTIMA."""
    ends = [suspects.best_policy(Q, 8), optima.frontier_policy(Q, 0.5, 8), suspects.best_policy(Q, 1)]
    expected = torch.stack([torch.stack([WEIGHTS @ pass_at(pi, k) for k in (1, 8)]) for pi in ends])
    torch.testing.assert_close(optima.frontier(Q, WEIGHTS, 8, points=3), expected, rtol=0, atol=1e-9)
    target = optima.mean_kl_policy_at(Q, WEIGHTS, optima.uniform(Q), 0.2)
    assert (WEIGHTS @ optima.kl(target, optima.uniform(Q))).item() == pytest.approx(0.2, abs=1e-6)


# --- exact evaluation of a model -------------------------------------------------------------------------------------
def test_candidate_log_probs_are_those_of_the_model():
    """Of a tiny policy that has learned the names of three prompts, somewhat."""
    problems = [next(p for p in optima.problems_of() if p.level == level) for level in (2, 3, 5)]
    groups, recipe = [suspects.candidates(problem) for problem in problems], {"steps": 20, "batch": 8, "lr": 1e-2}
    task = dataclasses.replace(task_of("suspects"), train=[], warm_start_problems=groups, warm_start=recipe)
    policy = harness.policy.warm_start(task)
    with torch.no_grad():
        log_pi = exact.candidate_log_probs(policy, task, problems)
        in_parts = exact.candidate_log_probs(policy, task, problems, prompts=2)
        cold = exact.candidate_log_probs(policy, task, problems, temperature=0.5)
    torch.testing.assert_close(log_pi, in_parts, atol=1e-4, rtol=1e-4)
    assert log_pi.shape == (3, 8) and log_pi.dtype == torch.float64
    for problem, row, cold_row in zip(problems, log_pi, cold):
        fitting = suspects.listed(problem.prompt)
        assert row[len(fitting) :].tolist() == [-math.inf] * (8 - len(fitting))
        for response, value, cold_value in zip(fitting, row, cold_row):
            text = policy.tokenizer(problem.prompt + response).input_ids + [policy.tokenizer.eos_token_id]
            with torch.no_grad():
                logits = policy.model(torch.tensor([text])).logits[0, :-1]
            for temperature, seen in ((1.0, value), (0.5, cold_value)):
                chances = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(text[1:])[:, None])
                start = len(problem.prompt) - 1
                assert seen.item() == pytest.approx(chances[start:].sum().item(), abs=1e-3)


def test_a_policy_is_evaluated_by_level_beside_its_base(monkeypatch):
    policies = {"sft": Q, "base": UNIFORM}
    monkeypatch.setattr(exact, "log_probs", lambda model, held_out, temperature: policies[model].log())
    found = exact.evaluation("sft", "base", votes=())
    assert list(found["pass@8"]) == ["all", *map(str, range(2, 9))] and "maj@8" not in found
    assert found["pass@8"]["all"] == pytest.approx((WEIGHTS @ pass_at(Q, 8)).item())
    assert found["kl"]["3"] == pytest.approx(kl_to_uniform(Q)[LEVELS == 3].mean().item())
