"""Variance of the pass@k gradient at an equal number of samples: n = k groups, or all k-subsets of n > k; unbiased,
biased, and without a baseline.

    python benchmarks/variance.py

Exactly, on a bandit of 4 arms: all 4^8 draws of 8 samples, k = 4, float64. Then on the warm-started tiny policy: many
draws of 16 samples to each of the same 32 prompts of `arithmetic`, k = 4; the variance is that of sampling alone.
"""

import itertools
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import torch
import tyro
from tqdm import tqdm

import common
import harness.policy
import harness.run
from pass_at_k_pg import advantages
from verifiers import load_task

K = 4  # of pass@k


@dataclass
class Args:
    draws: int = 64
    """of 16 samples a prompt, on the tiny policy; 0: the bandit alone"""
    threads: int = 1
    """CPU threads"""
    json: str | None = None
    """write the numbers to this file, too"""


def in_groups(rewards: torch.Tensor, estimator: str) -> torch.Tensor:
    """Advantages (B, n) with n = k: the n samples are n / K groups of K, whose gradients are averaged."""
    groups = rewards.unflatten(-1, (-1, K))  # (B, n / K, K)
    return advantages(groups, K, estimator).flatten(-2) / groups.shape[-2]


def no_baseline(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages (B, n): the maximum of each group of K for each of its samples; groups averaged."""
    groups = rewards.unflatten(-1, (-1, K))  # (B, n / K, K)
    return groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2) / groups.shape[-2]


ESTIMATORS = {
    "no baseline, n = k": no_baseline,
    "unbiased, n = k": lambda rewards: in_groups(rewards, "unbiased"),
    "unbiased, n > k": lambda rewards: advantages(rewards, K, "unbiased"),
    "biased, n = k": lambda rewards: in_groups(rewards, "biased"),
    "biased, n > k": lambda rewards: advantages(rewards, K, "biased"),
    "mean": lambda rewards: advantages(rewards, K, "mean"),
}
CASES = {"0/1, right .03": (0.03, (1, 0, 0, 0)), "0/1, right .1": (0.1, (1, 0, 0, 0)),
         "0/1, right .3": (0.3, (1, 0, 0, 0)), "0/1, right .7": (0.7, (1, 0, 0, 0)),
         "graded, best .1": (0.1, (1, 0.6, 0.3, 0))}  # fmt: skip


def bandit_moments(chance: float, rewards: tuple, n: int = 8) -> dict[str, tuple[float, float, float]]:
    """Of each estimator of grad J_K (Tang: J_k = E[max_i r_i]): bias, in lengths of that gradient; the part of the
    mean estimate across it, which no learning rate could mend, in lengths of the mean; standard deviation, as the bias.
    """
    r = torch.tensor(rewards, dtype=torch.float64)
    rest = (1 - chance) * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    theta = torch.cat([torch.tensor([chance], dtype=torch.float64), rest]).log().requires_grad_()
    pi = theta.softmax(-1)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=K)))  # (4^K, K)
    (exact,) = torch.autograd.grad((pi[tuples].prod(-1) * r[tuples].amax(-1)).sum(), theta)
    pi = pi.detach()
    y = torch.tensor(list(itertools.product(range(4), repeat=n)))  # (4^n, n)
    weight = pi[y].prod(-1)  # (4^n,)
    score = torch.eye(4, dtype=torch.float64) - pi  # (4, 4): grad log pi of each arm
    moments = {}
    for name, estimator in ESTIMATORS.items():
        g = torch.einsum("sn,snd->sd", estimator(r[y]), score[y])  # (4^n, 4)
        mean = weight @ g
        deviation = (weight * (g - mean).square().sum(-1)).sum().sqrt() / exact.norm()
        across = mean - (mean @ exact) / (exact @ exact) * exact
        moments[name] = (
            ((mean - exact).norm() / exact.norm()).item(),
            (across.norm() / mean.norm()).item(),
            deviation.item(),
        )
    return moments


def model_moments(draws: int) -> dict[str, tuple[float, float]]:
    """Of each estimator on the tiny policy: length of the mean gradient, and standard deviation of one draw's."""
    task = load_task("arithmetic")
    policy = harness.policy.load_policy("tiny", task, "cpu")
    problems = harness.run.training_batch(task.train, 0, 32, 0)
    prompts = harness.policy.encode_prompts(policy, task, problems, task.max_new_tokens)
    parameters = list(policy.model.parameters())
    total = dict.fromkeys(ESTIMATORS, 0.0)  # sums of gradients, and of their squared lengths
    squares = dict.fromkeys(ESTIMATORS, 0.0)
    for draw in tqdm(range(draws), desc="tiny policy", unit="draw"):
        generator = harness.run.random_numbers(policy.device, "variance", draw)
        rollouts = common.sample(policy, prompts, 16, task.max_new_tokens, generator=generator)
        rewards = task.verify(problems, common.decode(policy, rollouts)).rewards
        for name, estimator in ESTIMATORS.items():
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            common.accumulate_gradient(policy, rollouts, estimator(rewards))
            g = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
            total[name] = total[name] + g
            squares[name] += (g @ g).item()
    moments = {}
    for name in ESTIMATORS:
        mean = total[name] / draws
        variance = (squares[name] - draws * (mean @ mean).item()) / (draws - 1)
        moments[name] = max((mean @ mean).item() - variance / draws, 0.0) ** 0.5, variance**0.5
    return moments


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads)
    results = {"bandit": {}, "model": None}
    print(f"bandit, k = {K}, 8 samples: bias, its part across the gradient; standard deviation of one estimate,\n"
          "all in lengths of the gradient of max@k (the part across: of the mean estimate)\n")  # fmt: skip
    for name, case in CASES.items():
        results["bandit"][name] = bandit_moments(*case)
    cells = {name: [f"{b:.2f}, {a:.2f}; {s:.2f}" for b, a, s in (results["bandit"][case][name] for case in CASES)]
             for name in ESTIMATORS}  # fmt: skip
    measure.print_table(["", *CASES], [[name, *row] for name, row in cells.items()])
    if args.draws:
        results["model"] = model_moments(args.draws)
        print(f"tiny policy, k = {K}, 32 prompts x 16 samples, {args.draws} draws\n")
        rows = [
            [name, f"{m:.4f}", f"{s:.4f}", f"{s / m:.1f}" if m else "-"] for name, (m, s) in results["model"].items()
        ]
        measure.print_table(["", "length of the mean", "standard deviation", "deviation / length"], rows)
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
