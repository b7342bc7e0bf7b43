"""Cost of the advantages and of the exact metrics as prompts B, samples n and k grow, beside all subsets by force.

    python benchmarks/estimators.py

Brute force averages over every k-subset of the n samples, by the definitions in the functions' docstrings, one line for
each of max, majority vote and best score; it runs where there are few enough of them, and the largest difference from
it is printed. Rewards are graded (of twenty values, so that ties occur); votes are for five answers or none, with
the most voted ones ahead as a policy would have them.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import measure  # first: puts the repository on the path
import torch
import tyro

import bon_rl
import common
import majority_pg
import pass_at_k_pg

SORTING = (
    (8, 16, 4),
    (8, 16, 8),
    (64, 16, 8),
    (64, 256, 16),
    (64, 4096, 16),
    (64, 4096, 1024),
    (256, 4096, 16),
)  # B, n, k
VOTING = ((8, 12, 6), (8, 16, 8), (32, 16, 8), (32, 32, 8), (32, 64, 8), (32, 128, 8), (32, 128, 64), (8, 256, 16))
BRUTE = 200_000  # subsets times prompts, at most


@dataclass
class Args:
    rounds: int = 5
    """calls that are timed, fast and brute force in turn"""
    threads: int = 1
    """CPU threads"""
    json: str | None = None
    """write the numbers to this file, too"""


def best(scores: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Reward of the highest score, the mean of the tied: (..., m) twice -> (...)."""
    top = (scores == scores.amax(-1, keepdim=True)).double()
    return (top * rewards).sum(-1) / top.sum(-1)


def majority(votes: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Reward of the most frequent vote, the mean of the tied; 0 without votes: (..., m) twice -> (...)."""
    count = ((votes.unsqueeze(-1) == votes.unsqueeze(-2)).sum(-1) * (votes >= 0)).double()  # (..., m)
    share = (count == count.amax(-1, keepdim=True)) * (votes >= 0) / count.clamp(min=1)  # each tied answer weighs 1
    return (share * rewards).sum(-1) / share.sum(-1).clamp(min=1)


# What is measured: name -> (sizes, the function, the objective of a subset, its samples, what to average).
MAX, VOTE, BEST = ("rewards", "rewards"), ("votes", "correct"), ("scores", "rewards")
TABLE: dict[str, tuple[tuple, Callable, Callable, tuple[str, str], str]] = {
    "pass_at_k_pg mean": (SORTING, lambda d, k: pass_at_k_pg.advantages(d.rewards, k, "mean"), best, MAX, "mean"),
    "pass_at_k_pg unbiased": (SORTING, lambda d, k: pass_at_k_pg.advantages(d.rewards, k), best, MAX, "unbiased"),
    "pass_at_k_pg biased": (SORTING, lambda d, k: pass_at_k_pg.advantages(d.rewards, k, "biased"), best, MAX, "biased"),
    "bon_rl exact": (SORTING[:4], lambda d, k: bon_rl.advantages(d.rewards, d.scores, k), best, BEST, "unbiased"),
    "pass_at_k": (SORTING, lambda d, k: common.pass_at_k(d.rewards, k), best, MAX, "metric"),
    "best_of_k": (SORTING, lambda d, k: common.best_of_k(d.scores, d.rewards, k), best, BEST, "metric"),
    "majority_pg unbiased": (
        VOTING, lambda d, k: majority_pg.advantages(d.votes, d.correct, k), majority, VOTE, "unbiased",
    ),
    "majority_pg biased": (
        VOTING, lambda d, k: majority_pg.advantages(d.votes, d.correct, k, "biased"), majority, VOTE, "biased",
    ),
    "majority_at_k": (VOTING, lambda d, k: majority_pg.majority_at_k(d.votes, d.correct, k), majority, VOTE, "metric"),
}  # fmt: skip


def brute_force(objective: Callable, samples: tuple[torch.Tensor, ...], k: int, average: str) -> torch.Tensor:
    """(B,) for the metric, (B, n) for advantages, by enumeration of all k-subsets."""
    B, n = samples[0].shape
    if average == "mean":  # RLOO: each reward less the mean of the others
        return (samples[-1] - (samples[-1].sum(-1, keepdim=True) - samples[-1]) / (n - 1)) / n
    subsets = torch.tensor(list(itertools.combinations(range(n), k)))  # (S, k)
    chosen = [s[:, subsets] for s in samples]  # (B, S, k)
    if average == "metric":
        return objective(*chosen).mean(-1)
    without = [objective(*(s[..., [j for j in range(k) if j != i]] for s in chosen)) for i in range(k)]  # k of (B, S)
    A = objective(*chosen).unsqueeze(-1) - torch.stack(without, -1)  # (B, S, k)
    if average == "biased":
        A = A - A.mean(-1, keepdim=True)
    everywhere = subsets.flatten().expand(B, -1)  # (B, S*k)
    return torch.zeros(B, n, dtype=A.dtype).scatter_add(-1, everywhere, A.flatten(1)) / len(subsets)


def draw(B: int, n: int) -> SimpleNamespace:
    """Random rewards and scores (B, n) float64, votes (B, n) and `correct`, rewards that are a function of the vote."""
    generator = torch.Generator().manual_seed(0)
    votes = torch.multinomial(torch.tensor([4.0, 8, 6, 3, 2, 1]), B * n, True, generator=generator).view(B, n) - 1
    return SimpleNamespace(
        rewards=torch.randint(20, (B, n), generator=generator).double() / 20,
        scores=torch.randint(20, (B, n), generator=generator).double(),
        votes=votes, correct=((votes == 1) + 0.25 * (votes == 2)).double(),
    )  # fmt: skip


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads)
    rows, results = [], []
    for name, (sizes, function, objective, samples, average) in TABLE.items():
        for B, n, k in sizes:
            data, kept = draw(B, n), {}
            calls = {"fast": lambda: kept.update(fast=function(data, k))}
            if B * math.comb(n, k) <= BRUTE:
                xs = tuple(getattr(data, s) for s in samples)
                calls["brute"] = lambda: kept.update(brute=brute_force(objective, xs, k, average))
            times = measure.interleaved(calls, args.rounds)
            middle = {key: measure.quartiles(values)[0] for key, values in times.items()}
            row, result = [name, B, n, k, measure.spread([1e3 * s for s in times["fast"]], ".2f")], {}
            if "brute" in calls:
                difference = (kept["fast"] - kept["brute"]).abs().max().item()
                row += [f"{1e3 * middle['brute']:.1f}", f"{middle['brute'] / middle['fast']:.0f}", f"{difference:.0e}"]
                result = {"brute": times["brute"], "difference": difference}
            rows.append(row + [""] * (8 - len(row)))
            results.append({"function": name, "B": B, "n": n, "k": k, "fast": times["fast"], **result})
    head = ["", "B", "n", "k", "ms, median [quartiles]", "all subsets, ms", "ratio", "largest difference"]
    measure.print_table(head, rows)
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
