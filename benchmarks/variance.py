"""Bias and variance of the estimators, held to exact gradients: by enumeration, and on the network itself.

    python benchmarks/variance.py                          # softmax policies; tiny, as warm-started on `suspects`
    python benchmarks/variance.py --runs runs/reproduce    # and how the gradients of pass@1 and pass@8 lie in training

Softmax policies over 4 arms, float64, all draws. First 8 samples and k = 4 of pass@k. Then BoN-RLB, BoN-RLB(P), its
all-sample form (Chow) and the leave-one-out estimator (Tang), n = N = 4, where the 0/1 reward selects: Best-of-N is
pass@N, and all four have one expectation where the failure rate P_fail is known.

Network: on `suspects` each objective is a function of the log-probs of the names a prompt lists, and the mean of an
estimator is the gradient of its utility (spectrum.py) at the chance of the hidden name. Autograd gives both in
parameter space, without sampling; and the cosine of the gradients of pass@1 and pass@8 (interference, 2602.21189).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import exact  # first: it puts the repository on the path
import measure
import numpy as np
import optima
import reproduce
import spectrum
import torch

import common
from bon_rl import advantages as best_of_n
from harness.policy import load_policy
from pass_at_k_pg import advantages
from verifiers import Problem, Task
from verifiers.suspects import LEVELS, posterior

K = 4  # of pass@k, and N, on the softmax policies


@dataclass
class Args:
    runs: Path | None = None  # folder of reproduce.py: the cosines of two gradients along its runs
    seeds: int = 5  # of these runs
    publish: bool = False  # put the tables into docs/gradients.md


def moments(theta: torch.Tensor, objective: Callable, estimator: Callable, n: int) -> tuple[float, float, float]:
    """Of an estimate from n samples of softmax(theta), by all draws: bias, relative to the norm of the exact gradient;
    the part of the mean across it, which no learning rate could mend, relative to the mean; standard deviation, as the
    bias.

    objective: probabilities (K,) -> a scalar. estimator: arms (K^n, n) -> advantages (K^n, n)."""
    (truth,) = torch.autograd.grad(objective(theta.softmax(-1)), theta)
    pi, arms = theta.softmax(-1).detach(), len(theta)
    y = torch.cartesian_prod(*[torch.arange(arms)] * n).view(-1, n)  # (K^n, n)
    weight = pi[y].prod(-1)  # (K^n,)
    score = torch.eye(arms, dtype=torch.float64) - pi  # (K, K): grad log pi of each arm
    g = torch.einsum("sn,snd->sd", estimator(y), score[y])  # (K^n, K)
    mean, length = weight @ g, truth.norm()
    across = mean - (mean @ truth) / (truth @ truth) * truth
    deviation = (weight * (g - mean).square().sum(-1)).sum().sqrt()
    return ((mean - truth).norm() / length).item(), (across.norm() / mean.norm()).item(), (deviation / length).item()


def in_groups(rewards: torch.Tensor, estimator: str) -> torch.Tensor:
    """Advantages (B, n) with n = k: the n samples are n / K groups of K, whose gradients are averaged."""
    groups = rewards.unflatten(-1, (-1, K))  # (B, n / K, K)
    if estimator == "no baseline":
        A = groups.amax(-1, keepdim=True).expand_as(groups)
    else:
        A = advantages(groups, K, estimator)
    return A.flatten(-2) / groups.shape[-2]  # (B, n / K, K) -> (B, n)


ESTIMATORS = {
    "no baseline, n = k": partial(in_groups, estimator="no baseline"),
    **{f"{name}, n {sign} k": partial(function, estimator=name) for name in ("unbiased", "biased")
       for sign, function in (("=", in_groups), (">", partial(advantages, k=K)))},
    "mean": partial(advantages, k=K, estimator="mean"),
}  # fmt: skip
CASES = {f"0/1, right {str(p)[1:]}": (p, (1, 0, 0, 0)) for p in (0.03, 0.1, 0.3, 0.7)}
CASES["graded, best .1"] = 0.1, (1, 0.6, 0.3, 0)


def policy_of(chance: float) -> torch.Tensor:
    """Log-odds of 4 arms, the first with this chance; a leaf that requires a gradient."""
    rest = (1 - chance) * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return torch.cat([torch.tensor([chance], dtype=torch.float64), rest]).log().requires_grad_()


def bandit_moments(chance: float, rewards: tuple, n: int = 8) -> dict[str, tuple[float, float, float]]:
    """`moments` of each of ESTIMATORS, for the gradient of E[max_i r_i] over K tries (Tang)."""
    r, tuples = torch.tensor(rewards, dtype=torch.float64), torch.tensor(list(itertools.product(range(4), repeat=K)))

    def best(pi: torch.Tensor) -> torch.Tensor:
        return (pi[tuples].prod(-1) * r[tuples].amax(-1)).sum()

    return {name: moments(policy_of(chance), best, lambda y: f(r[y]), n) for name, f in ESTIMATORS.items()}


TIES = {"exact": "leave-one-out (Tang)", "rlb": "BoN-RLB", "rlb-p": "BoN-RLB(P)", "rlb-all": "all samples"}


def tie_moments(p_fail: float, N: int, estimator: str, known: bool) -> tuple[float, float, float]:
    """`moments` of an estimator of grad pass@N from N samples. known: it is told p_fail, and does not estimate it."""
    reward = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)

    def of(y: torch.Tensor) -> torch.Tensor:
        p = torch.full((len(y),), p_fail, dtype=torch.float64) if known and estimator != "exact" else None
        return best_of_n(reward[y], reward[y], N, estimator, p_fail=p)

    return moments(policy_of(1 - p_fail), lambda pi: 1 - (1 - pi[0]) ** N, of, N)


OBJECTIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {  # (P,) of q and pi, (P, 8) each
    **{f"pass@{k}": partial(optima.pass_at_k, k=k) for k in (1, 7, 8)},
    "MaxRL": lambda q, pi: sum(optima.pass_at_k(q, pi, j) / j for j in range(1, 16)),
}
NETWORK = {  # name -> samples, advantages of rewards (B, n), and the objective that it is meant to ascend
    "mean": (16, partial(advantages, k=8, estimator="mean"), "pass@1"),
    "unbiased, k = 8": (16, partial(advantages, k=8), "pass@8"),
    "biased, k = 8": (16, partial(advantages, k=8, estimator="biased"), "pass@7"),
    "MaxRL, n = 16": (16, partial(advantages, k=8, estimator="maxrl"), "MaxRL"),
    **{f"{name}, N = 8": (16, lambda r, x=estimator: best_of_n(r, r, 8, x), "pass@8")
       for name, estimator in (("BoN-RLB(P)", "rlb-p"), ("BoN-RLB", "rlb"))},
}  # fmt: skip


def flat_gradient(policy: common.Policy, value: torch.Tensor) -> torch.Tensor:
    """The gradient of a scalar by all parameters, (D,) float64; the graph stays."""
    gradients = torch.autograd.grad(value, list(policy.model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]).double()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """0 where one of them is 0."""
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


def network_moments(policy: common.Policy, task: Task, problems: Sequence[Problem]) -> dict[str, tuple[float, float]]:
    """Of the mean estimate of each of NETWORK, over these prompts: bias, relative to the norm of its objective's
    gradient, and the cosine with the gradient of pass@8."""
    q, pi = posterior([p.prompt for p in problems]), exact.candidate_log_probs(policy, task, problems).exp()
    truth = {name: flat_gradient(policy, objective(q, pi).mean()) for name, objective in OBJECTIVES.items()}
    result = {}
    for name, (n, estimator, objective) in NETWORK.items():
        utility = spectrum.utility(spectrum.worth(estimator, n), pi)  # (P, 8)
        mean = flat_gradient(policy, (q * utility).sum(-1).mean())
        bias = (mean - truth[objective]).norm() / truth[objective].norm()
        result[name] = bias.item(), cosine(mean, truth["pass@8"])
    return result


def interference(policy: common.Policy, task: Task, problems: Sequence[Problem]) -> list[float]:
    """Cosines of the gradients of pass@1 and pass@8 over the prompts of each level, 2 to 8, and over all, (8,)."""
    pairs = []
    for level in LEVELS:
        some = [problem for problem in problems if problem.level == level]
        q, pi = posterior([p.prompt for p in some]), exact.candidate_log_probs(policy, task, some).exp()
        pairs.append([flat_gradient(policy, optima.pass_at_k(q, pi, k).mean()) for k in (1, 8)])
    return [cosine(*pair) for pair in (*pairs, map(sum, zip(*pairs)))]


ALONG = {"before": "base", "mean, 50 steps": "mean-50", "mean, 150 steps": "mean", "k = 8, 50 steps": "k8-50",
         "k = 8, 150 steps": "k8"}  # fmt: skip


def interference_along(out: Path, seeds: int) -> dict[str, list[list[float]]]:
    """`interference` on 350 training prompts, by the policy's name: (seeds, 8), of the runs that are done."""
    task, problems, result = exact.the_task(), optima.problems_of(held_out=False), {label: [] for label in ALONG}
    for (label, name), seed in itertools.product(ALONG.items(), range(seeds)):
        folder = reproduce.run_folder(out, name, seed)
        if (folder / "exact.json").exists():
            model = f"tiny-{seed}" if name == "base" else str(folder / "policy")
            result[label].append(interference(load_policy(model, task, "cpu"), task, problems))
    return result


def tables(args: Args) -> dict[str, str]:
    """The markdown tables, by the names of their markers."""
    found, bandit = {}, {case: bandit_moments(*setting) for case, setting in CASES.items()}
    cells = {name: ["{:.2f}, {:.2f}; {:.2f}".format(*bandit[case][name]) for case in CASES] for name in ESTIMATORS}
    head = ["bias, its part across; deviation", *CASES]
    found["variance-bandit"] = measure.markdown(head, [[name, *row] for name, row in cells.items()])
    rows = []
    for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        known = [f"{tie_moments(p, K, name, True)[2]:.2f}" for name in TIES]
        estimated = ("{0:.2f}; {2:.2f}".format(*tie_moments(p, K, name, False)) for name in list(TIES)[1:])
        rows.append([p, *known, *estimated])
    estimated = [f"{name}, estimated: bias; deviation" for name in list(TIES.values())[1:]]
    found["variance-ties"] = measure.markdown(["P_fail", *TIES.values(), *estimated], rows)
    problems = [problem for i, problem in enumerate(optima.problems_of(False)) if i % 50 in (16, 33)]  # two a level
    of = network_moments(load_policy("tiny", exact.the_task(), "cpu"), exact.the_task(), problems)
    rows = [[name, NETWORK[name][-1], *(f"{x:.2f}" for x in row)] for name, row in of.items()]
    found["variance-network"] = measure.markdown(["estimator", "ascends", "bias", "mean, cosine"], rows)
    if args.runs:
        along = interference_along(args.runs, args.seeds).items()
        rows = [
            [name, *(measure.interval(x, ".2f") for x in np.array(seeds).T)] for name, seeds in along if len(seeds) > 1
        ]
        found["variance-interference"] = measure.markdown(["policy", *(f"level {x}" for x in LEVELS), "all"], rows)
    return found


def main(args: Args) -> None:
    print(measure.in_words(measure.machine(1)) + "\n")
    found = tables(args)
    for name, table in found.items():
        print(f"{name}\n\n{table}\n")
    if args.publish:
        measure.publish(found)


if __name__ == "__main__":
    measure.program(main, Args)
