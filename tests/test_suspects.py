"""The task `lines`, what theory says of it, and the exact evaluation, each against enumeration or search."""

import importlib
import itertools
import json
import math
import sys

import pytest
import torch
from enumeration import best_of_value, majority_value
from runs import ROOT

import common
import harness.policy
from verifiers import BadInput, Problem, Task, lines, load_task
from verifiers import learned as learned_verifier

sys.path.insert(0, str(ROOT / "benchmarks"))
optima, exact = importlib.import_module("optima"), importlib.import_module("exact")

NAMES = ("lines", "lines_uniform")
Q, WEIGHTS, LEVELS = optima.held_out_kinds()
SOME = torch.tensor([[1, 0, 0], [0.8, 0.2, 0], [0.5, 0.5, 0], [0.7, 0.2, 0.1], [0.9, 0.09, 0.01]]).double()


def all_lines() -> dict[str, dict[str, int]]:
    """prompt -> response -> a, over all (a, b, x)."""
    found = {}
    for a, b, x in itertools.product(range(2, 10), range(100), range(3, 16)):
        found.setdefault(f"{x}>{a * x + b}:", {})[f"{a}*x+{b}"] = a
    return found


def random_policies(q: torch.Tensor, count: int) -> torch.Tensor:
    """(count, *q.shape): of any sharpness, on the candidates of q."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, *q.shape, dtype=torch.float64, generator=generator)
    scale = 6 * torch.rand(count, 1, 1, dtype=torch.float64, generator=generator)
    return (scale * logits).where(q > 0, -torch.inf).softmax(-1)


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, prior", [("lines", lambda a: 1 / (a - 1) ** 2), ("lines_uniform", lambda a: 1)])
def test_fitting_lines_and_their_posterior_are_those_of_enumeration(name, prior):
    found = all_lines()
    assert len(found) == 2119 and {len(fitting) for fitting in found.values()} == set(range(1, 9))
    for row, (prompt, fitting) in zip(lines.posterior(list(found), name), found.items()):
        total = sum(map(prior, fitting.values()))
        expected = {response: prior(a) / total for response, a in fitting.items()}
        assert dict(zip(lines.fitting_lines(prompt), row.tolist())) == pytest.approx(expected)
        assert row[len(fitting) :].tolist() == [0] * (8 - len(fitting))


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_drawn_as_the_task_says_and_the_split_is_by_prompt(name):
    task, again, found = load_task(name), load_task(name), all_lines()
    assert (task.train, task.test) == (again.train, again.test)
    train, test = ({problem.prompt for problem in side} for side in (task.train, task.test))
    assert not train & test and not {problem.prompt for problem in task.warm_start_problems} & test
    assert 0.18 < sum(map(lines.is_held_out, found)) / len(found) < 0.22 and all(map(lines.is_held_out, test))
    for problem in {*task.train, *task.test, *task.warm_start_problems}:
        assert problem.answer == problem.solution in found[problem.prompt]
        assert problem.level == len(found[problem.prompt])
    for side, tolerance in ((task.train, 0.01), (task.test, 0.005)):
        assert len({sum(problem.level == level for problem in side) for level in range(1, 9)}) == 1
        q = lines.posterior([problem.prompt for problem in side], name)
        place = torch.tensor([list(found[problem.prompt]).index(problem.answer) for problem in side])
        shares = torch.nn.functional.one_hot(place, 8).double().mean(0)
        torch.testing.assert_close(shares, q.mean(0), atol=tolerance, rtol=0)
    problems = optima.prompts_once()
    expected = optima.prompt_weights(problems, name) @ lines.best_pass_at_k(problems, 4, name)
    for side in (task.test, task.train):
        assert task.best(side, 4).mean().item() == pytest.approx(expected.item(), abs=0.005)


def test_warm_start_problems_prefer_no_line():
    task = load_task("lines")
    counts = torch.zeros(8)
    for problem in task.warm_start_problems:
        if problem.level == 8:
            counts[lines.fitting_lines(problem.prompt).index(problem.answer)] += 1
    torch.testing.assert_close(counts / counts.sum(), torch.full((8,), 1 / 8), atol=0.02, rtol=0)


def test_data_is_refused():
    with pytest.raises(BadInput, match="makes its own problems"):
        load_task("lines", "file.jsonl")


def test_verdicts_on_right_wrong_and_hostile_responses():
    problem = Problem("7>45:", "3*x+24", "3*x+24", 5)
    right = ["3*x+24", " 3*x+24\n", "03*x+024", "0" * 10**5 + "3*x+24"]
    wrong = ["2*x+31", "2*x+031", "3*x+2", "3*x+" + "1" * 10**6, "9" * 10**6 + "*x+24"]
    malformed = [
        "",
        "3",
        "3*x",
        "3x+24",
        "3*x+24.",
        "3*x-24",
        "-3*x+24",
        "3*x+24+0",
        "3*x+24,3*x+24",
        "3*y+24",
        "3*X+24",
    ]
    malformed += ["3*x + 24", "3*x+24\n4*x+17", "٣*x+24", "3*x+²", "3*x+24\0", "3*x+0x18", "0" * 10**6, "3*x+" * 10**5]
    malformed += ["3*x+2_4", "3e0*x+24", "y=3*x+24", "*x+", "3*x+", "*x+24"]
    verdict = lines.verify([problem], [right + wrong + malformed])
    assert verdict.rewards.tolist() == [[1.0] * 4 + [0.0] * (len(wrong) + len(malformed))]
    votes = verdict.votes[0].tolist()
    assert votes[:4] == [0] * 4 and votes[4] == votes[5] == 4 and votes[6:9] == [6, 7, 8]
    assert set(votes[9:]) == {-1} and len(votes) == 9 + len(malformed)
    verdict = lines.verify([problem, Problem("3>6:", "2*x+0", "", 1)], [["3*x+24", "2*x+0"]] * 2)
    assert verdict.rewards.tolist() == [[1, 0], [0, 1]] and verdict.votes.tolist() == [[0, 1], [0, 1]]
    assert lines.line("2*x+000") == "2*x+0"


# --- the best policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 2, 3, 8, 32))
def test_no_policy_on_a_grid_of_the_simplex_has_more_pass_at_k(k):
    grid = torch.tensor([(i, j, 100 - i - j) for i in range(101) for j in range(101 - i)]).double() / 100  # (G, 3)
    best = lines.best_policy(SOME, k)
    torch.testing.assert_close(best.sum(-1), torch.ones(5).double())
    assert (best >= 0).all() and (best[SOME == 0] == 0).all()
    for q, pi in zip(SOME, best):
        highest = optima.pass_at_k(q, grid, k).max()
        value = optima.pass_at_k(q, pi, k)
        assert highest <= value + 1e-12 and value - highest < 1e-3


def test_no_random_policy_has_more_pass_at_k_than_the_task_says():
    task, policies = load_task("lines"), random_policies(Q, 10_000)
    problems = {lines.posterior([p.prompt])[0].numpy().tobytes(): p for p in optima.prompts_once()}
    problems = [problems[row.numpy().tobytes()] for row in Q]
    for k in (1, 2, 8, 32):
        best = task.best(problems, k)
        assert best.dtype == torch.float64 and best.shape == (len(Q),)
        assert (optima.pass_at_k(Q, policies, k) <= best + 1e-12).all()
    with pytest.raises(ValueError, match="at least 1"):
        task.best(problems, 0)


def bon_sft(pi, N=8):
    return torch.special.xlogy(Q, 1 - (1 - pi) ** N).sum(-1)


def maxrl(pi, n=16):
    return sum(optima.pass_at_k(Q, pi, j) / j for j in range(1, n))


def trade(pi, weight, k):
    return weight * optima.pass_at_k(Q, pi, 1) + (1 - weight) * optima.pass_at_k(Q, pi, k)


def kl_to_uniform(pi):
    return torch.special.xlogy(pi, pi * LEVELS.unsqueeze(-1)).sum(-1)


OPTIMA = {
    "pass@8": (lambda pi: optima.pass_at_k(Q, pi, 8), lambda: lines.best_policy(Q, 8)),
    "SFT": (lambda pi: torch.special.xlogy(Q, pi).sum(-1), lambda: Q),
    "BoN-SFT": (bon_sft, lambda: optima.bon_sft_policy(Q, 8)),
    "MaxRL": (maxrl, lambda: optima.maxrl_policy(Q, 16)),
    "frontier": (lambda pi: trade(pi, 0.3, 8), lambda: optima.frontier_policy(Q, 0.3, 8)),
    "frontier, nearly straight": (lambda pi: trade(pi, 0.9, 32), lambda: optima.frontier_policy(Q, 0.9, 32)),
    "mean - beta KL": (
        lambda pi: (Q * pi).sum(-1) - 0.5 * kl_to_uniform(pi),
        lambda: optima.mean_kl_policy(Q, 0.5, optima.uniform(Q)),
    ),
    "maj@8 - beta KL": (
        lambda pi: optima.maj_at_k(Q, pi, 8) - 0.5 * kl_to_uniform(pi),
        lambda: optima.majority_kl_policy(Q, 0.5, optima.uniform(Q)),
    ),
}


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
    others = random_policies(Q, 10 if "maj" in name else 1_000)  # (1000, U, 8)
    for share in (1.0, 0.1, 0.01):
        assert (objective((1 - share) * optimum + share * others) <= objective(optimum) + 1e-9).all()


def test_the_optima_are_those_of_the_published_table():
    """pass@1, 2, 4, 8, 16, 32; computed by other code over 60 random problems a level, hence the tolerance."""
    expected = {
        "base": (0.340, 0.489, 0.676, 0.853, 0.963, 0.997), "k1": (0.720,) * 6,
        "k4": (0.525, 0.712, 0.852, 0.914, 0.937, 0.946), "k8": (0.444, 0.634, 0.823, 0.936, 0.974, 0.985),
        "k16": (0.392, 0.567, 0.768, 0.920, 0.984, 0.998), "sft": (0.574, 0.728, 0.828, 0.895, 0.947, 0.977),
        "bon-sft-8": (0.427, 0.612, 0.805, 0.932, 0.982, 0.996), "maxrl-16": (0.616, 0.748, 0.823, 0.876, 0.913, 0.934),
    }  # fmt: skip
    policies = optima.optima(Q)
    for name, row in expected.items():
        values = [(WEIGHTS @ optima.pass_at_k(Q, policies[name], k)).item() for k in optima.TRIES]
        assert values == pytest.approx(row, abs=0.0016), name


def test_the_committed_predictions_are_what_theory_says():
    saved, computed = json.loads(optima.PREDICTIONS.read_text()), optima.predictions()
    assert [row["what"] for row in saved["claims"]] == [row["what"] for row in computed["claims"]]
    assert {row["claim"] for row in saved["claims"]} == {*"B1 B2 B3 M1 M2 M3 M4 M5 C1 C2 C3 C4 C5 E1 E2 E3".split()}
    for a, b in zip(saved["claims"], computed["claims"]):
        assert a["predicted"] == (b["predicted"] if b["predicted"] is None else pytest.approx(b["predicted"], abs=2e-4))
    assert saved["policies"].keys() == computed["policies"].keys()
    for name, row in computed["policies"].items():
        assert saved["policies"][name] == pytest.approx(row, abs=2e-4)


# --- metrics ---------------------------------------------------------------------------------------------------------

PARTIAL = torch.tensor([0.5, 0.15, 0.05, 0, 0, 0, 0, 0]).double()  # .3 elsewhere
THREE = torch.tensor([0.6, 0.3, 0.1, 0, 0, 0, 0, 0]).double()


def expected_value(value, k: int) -> float:
    """E[value(tries)] of PARTIAL, by enumeration; tries are candidates 0 to 2, and 3 for elsewhere."""
    chances = [0.5, 0.15, 0.05, 0.3]
    return sum(math.prod(chances[y] for y in tries) * value(tries) for tries in itertools.product(range(4), repeat=k))


@pytest.mark.parametrize("k", (1, 2, 3, 5))
def test_metrics_of_a_policy_are_their_expectations(k):
    scores = torch.tensor([0.2, 0.9, 0.2, 1, 1, 1, 1, 1]).double()  # two candidates tie

    def average(value) -> float:
        """Over the hidden answer, too."""
        return sum(THREE[hidden].item() * expected_value(lambda tries: value(tries, hidden), k) for hidden in range(3))

    def vote(tries, hidden):
        return majority_value([(y if y < 3 else 3 + i, float(y == hidden)) for i, y in enumerate(tries)])

    def selected(tries, hidden):
        return best_of_value([(scores[y].item() if y < 3 else -1.0, float(y == hidden)) for y in tries])

    rows = THREE.expand(2, 8), PARTIAL.expand(2, 8)
    assert optima.pass_at_k(*rows, k).tolist() == pytest.approx([average(lambda tries, hidden: hidden in tries)] * 2)
    assert optima.maj_at_k(*rows, k).tolist() == pytest.approx([average(vote)] * 2)
    assert optima.best_of_n(*rows, scores.expand(2, 8), k).tolist() == pytest.approx([average(selected)] * 2)


def test_auc_within_problems_is_that_of_samples_to_prompts_with_both_kinds():
    scores = torch.tensor([0.2, 0.9, 0.2, 1, 1, 1, 1, 1]).double()  # two candidates tie

    def value(tries, hidden) -> float:
        """The AUC of the tries, 0 where all are right or all are wrong; elsewhere scores lowest."""
        seen = torch.tensor([scores[y].item() if y < 3 else -1.0 for y in tries])
        auc = learned_verifier.auc(seen, torch.tensor([float(y == hidden) for y in tries]))
        return 0.0 if math.isnan(auc) else auc

    def share(value) -> float:
        return sum(THREE[hidden].item() * expected_value(lambda tries: value(tries, hidden), 4) for hidden in range(3))

    expected = share(value) / share(lambda tries, hidden: 0 < sum(y == hidden for y in tries) < 4)
    ones = torch.ones(1).double()
    found = optima.auc_within(THREE[None], PARTIAL[None], scores[None], ones, n=4)
    assert found == pytest.approx(expected)
    scaled = optima.auc_within(THREE.expand(2, 8), PARTIAL.expand(2, 8), scores.expand(2, 8), ones.expand(2) / 2, n=4)
    assert scaled == pytest.approx(expected)


def test_kl_counts_what_is_elsewhere():
    base = torch.tensor([0.25, 0.25, 0.25, 0, 0, 0, 0, 0]).double()
    expected = 0.5 * math.log(2) + 0.15 * math.log(0.6) + 0.05 * math.log(0.2) + 0.3 * math.log(1.2)
    assert optima.kl(PARTIAL[None], base[None]).item() == pytest.approx(expected)
    assert optima.kl(base[None], base[None]).item() == pytest.approx(0, abs=1e-12)


def test_the_frontier_falls_from_the_best_of_one_try_and_nothing_lies_above_it():
    curve = optima.frontier(Q, WEIGHTS, 8, points=6)  # (21, 2)
    assert (curve.diff(dim=0)[:, 0] >= -1e-12).all() and (curve.diff(dim=0)[:, 1] <= 1e-12).all()
    policies = [*(lines.best_policy(Q, k) for k in (1, 2, 4, 8, 16, 32)), Q, *random_policies(Q, 1_000)]
    points = torch.stack([optima.pass_at_k(Q, torch.stack(policies), k) @ WEIGHTS for k in (1, 8)], -1)
    for weight in torch.linspace(0, 1, 6).double():
        mix = torch.stack([weight, 1 - weight])
        assert (points @ mix <= (curve @ mix).max() + 1e-9).all()
    target = optima.mean_kl_policy_at(Q, WEIGHTS, optima.uniform(Q), 0.2)
    assert (WEIGHTS @ optima.kl(target, optima.uniform(Q))).item() == pytest.approx(0.2, abs=1e-6)


# --- exact evaluation of a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> tuple[common.Policy, Task, list[Problem]]:
    """A tiny policy that has learned the lines of three prompts, somewhat."""
    problems = [next(p for p in optima.prompts_once() if p.level == level) for level in (1, 3, 5)]
    solutions = [Problem(p.prompt, line, line) for p in problems for line in lines.fitting_lines(p.prompt)]
    task = load_task("lines")
    task.train, task.warm_start_problems = [], solutions
    task.warm_start = {"steps": 60, "batch": 8, "lr": 5e-3}
    return harness.policy.warm_start(task), task, problems


def test_candidate_log_probs_are_those_of_the_model(learned):
    policy, task, problems = learned
    with torch.no_grad():
        log_pi = exact.candidate_log_probs(policy, task, problems)
        in_parts = exact.candidate_log_probs(policy, task, problems, rows=2)
        cold = exact.candidate_log_probs(policy, task, problems, temperature=0.5)
    torch.testing.assert_close(log_pi, in_parts, atol=1e-4, rtol=1e-4)
    assert log_pi.shape == (3, 8) and log_pi.dtype == torch.float64
    for problem, row, cold_row in zip(problems, log_pi, cold):
        fitting = lines.fitting_lines(problem.prompt)
        assert row[len(fitting) :].tolist() == [-math.inf] * (8 - len(fitting))
        for response, value, cold_value in zip(fitting, row, cold_row):
            text = policy.tokenizer(problem.prompt + response).input_ids + [policy.tokenizer.eos_token_id]
            with torch.no_grad():
                logits = policy.model(torch.tensor([text])).logits[0, :-1]
            for temperature, seen in ((1.0, value), (0.5, cold_value)):
                chances = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(text[1:])[:, None])
                start = len(problem.prompt) - 1
                assert seen.item() == pytest.approx(chances[start:].sum().item(), abs=1e-3)


def test_exact_metrics_are_what_sampling_tends_to(learned):
    policy, task, problems = learned
    with torch.no_grad():
        log_pi = exact.candidate_log_probs(policy, task, problems)
    metrics = exact.exact_metrics(log_pi, problems, "lines", log_pi)
    assert metrics["kl"].abs().max() < 1e-9 and (metrics["pass@32"] > 0.3).all()
    prompts = harness.policy.encode_prompts(policy, task, problems, task.max_new_tokens)
    rollouts = common.sample(policy, prompts, 1_000, task.max_new_tokens, generator=torch.Generator().manual_seed(0))
    q, responses = lines.posterior([p.prompt for p in problems]), common.decode(policy, rollouts)
    sampled = {name: torch.zeros(3, dtype=torch.float64) for name in ("pass@1", "pass@8", "elsewhere")}
    for i, problem in enumerate(problems):
        for line, share in zip(lines.fitting_lines(problem.prompt), q[i]):
            rewards = task.verify([Problem(problem.prompt, line)], [responses[i]]).rewards
            sampled["pass@1"][i] += share * rewards.double().mean()
            sampled["pass@8"][i] += share * common.pass_at_k(rewards, 8)[0]
            sampled["elsewhere"][i] += rewards.double().mean()
    sampled["elsewhere"] = 1 - sampled["elsewhere"]
    for name, value in sampled.items():
        torch.testing.assert_close(metrics[name], value, atol=0.04, rtol=0)


def test_exact_log_probs_can_be_differentiated(learned):
    policy, task, problems = learned
    q = lines.posterior([p.prompt for p in problems])
    log_pi = exact.candidate_log_probs(policy, task, problems)
    value = optima.pass_at_k(q, log_pi.exp(), 4).mean()
    gradients = torch.autograd.grad(value, list(policy.model.parameters()))
    assert all(g.isfinite().all() for g in gradients) and sum(g.norm() for g in gradients) > 0
