"""Is it sampling noise that keeps majority training behind (claim M5), or the objective? Exact gradient ascent on
the mean reward and on maj@k, without any sampling.

    python benchmarks/vote.py

100 prompts with 3 answers each, one right; the policy is a softmax of 4 random features of a prompt, so that prompts
share parameters and cannot all be right. maj@k and its gradient are exact: a sum over all counts of the answers.
"""

import itertools
import math
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import numpy as np
import torch
import tyro

ANSWERS, FEATURES, PROMPTS = 3, 4, 100


@dataclass
class Args:
    k: int = 5
    """votes"""
    seeds: int = 10
    """2 to 10: of features, right answers, and nothing else"""
    steps: int = 2000
    """of Adam, learning rate 0.02"""


def majority(p: torch.Tensor, k: int) -> torch.Tensor:
    """maj@k (B,) of answers' chances p (B, ANSWERS), the right one first; ties are split."""
    counts = [c for c in itertools.product(range(k + 1), repeat=ANSWERS) if sum(c) == k]
    orders = torch.tensor([math.factorial(k) / math.prod(map(math.factorial, c)) for c in counts])  # (C,)
    share = torch.tensor([(c[0] == max(c)) / c.count(max(c)) for c in counts], dtype=p.dtype)  # (C,)
    chance = (p.clamp(min=1e-12).log().unsqueeze(1) * torch.tensor(counts)).sum(-1).exp()  # (B, C)
    return (orders * share * chance).sum(-1)


def path(objective: str, args: Args, seed: int) -> np.ndarray:
    """Mean reward, maj@k and KL from the uniform policy at each step: (steps + 1, 3)."""
    generator = torch.Generator().manual_seed(seed)
    X, W = torch.randn(PROMPTS, FEATURES, generator=generator), torch.randn(FEATURES, ANSWERS, generator=generator)
    right = (X @ W + torch.randn(PROMPTS, ANSWERS, generator=generator)).argmax(-1)  # features do not tell all
    order = (right.unsqueeze(-1) + torch.arange(ANSWERS)) % ANSWERS  # (B, ANSWERS): the right one first
    theta = torch.zeros(FEATURES, ANSWERS, requires_grad=True)
    optimizer, points = torch.optim.Adam([theta], lr=0.02, maximize=True), []
    for _ in range(args.steps + 1):
        log_p = (X @ theta).log_softmax(-1).gather(-1, order)  # (B, ANSWERS)
        kl = (log_p.exp() * (log_p + math.log(ANSWERS))).sum(-1).mean()
        values = {"mean": log_p[:, 0].exp().mean(), "vote": majority(log_p.exp(), args.k).mean()}
        points.append([values["mean"].item(), values["vote"].item(), kl.item()])
        optimizer.zero_grad()
        values[objective].backward()
        optimizer.step()
    return np.array(points)


def main(args: Args) -> None:
    measure.describe_machine(1)
    torch.set_default_dtype(torch.float64)
    paths = [(path("mean", args, seed), path("vote", args, seed)) for seed in range(args.seeds)]
    rows = []
    for t in [t for t in (20, 50, 100, 200, 500, 1000, 2000) if t <= args.steps]:
        equal_steps = [vote[t, :2] - mean[t, :2] for mean, vote in paths]
        equal_kl = [[vote[t, 1] - np.interp(vote[t, 2], np.maximum.accumulate(mean[:, 2]), mean[:, 1])]
                    for mean, vote in paths]  # fmt: skip
        mean, ci = measure.interval(np.concatenate([equal_steps, equal_kl], 1))
        rows.append([t, *(f"{m:+.4f} ± {c:.4f}" for m, c in zip(mean, ci))])
    print(f"ascent on maj@{args.k} less ascent on the mean reward, ± 95% over {args.seeds} seeds\n")
    measure.print_table(["step", "mean reward", f"maj@{args.k}", f"maj@{args.k} at equal KL"], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
