"""Figure 1 of Tang et al. (ICML 2025, arXiv 2503.19595) on a 100-armed bandit. See docs/bandit.md.

Arms have fixed rewards drawn from N(0, 1); a softmax policy starts uniform and takes k = 4 samples a step, with
learning rate 1. All three metrics are computed exactly from the policy's probabilities, for many seeds at once.

    mean         A_i = (1/k) (r_i - mean_{j != i} r_j)          gradient of the mean reward
    mean x k     A_i = r_i - mean_{j != i} r_j                  the same as a sum over samples: k times as long
    unbiased     A_i = max_j r_j - max_{j != i} r_j             gradient of max@k (Lemma 1)
    biased       unbiased minus its mean over i                 gradient of max@(k-1)

The paper does not say which of the first two is its baseline. Its first two claims depend on it, so both are shown.
benchmarks/reproduce.py measures the claims of the figure, with intervals.

    python bandit.py
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import k_sample_advantages, mean_advantages, pass_at_k
from harness.report import mean_and_interval, number, pyplot, save_and_close, table
from harness.run import run_cli
from verifiers import BadInput

GROUPS = 20  # of seeds, for what is compared at equal KL


@dataclass
class Args:
    k: int = 4  # samples a step
    arms: int = 100  # arms of the bandit
    lr: float = 1.0  # learning rate (eta)
    steps: int = 400  # gradient steps
    seeds: int = 1000  # independent bandits, run side by side
    seed: int = 0  # of the rewards and of sampling
    figure: Path | None = Path("runs/bandit.png")  # where the three panels go


# --- copy this, with mean_advantages, k_sample_advantages, subset_weights, ranks, win_shares, best_of_k and pass_at_k
# of common.py --------------------------------------------------------------------------------------------------------


def advantages(rewards: torch.Tensor, estimator: str) -> torch.Tensor:
    """Advantages (S, k) of an estimator for rewards (S, k) of S bandits, n = k, float64: sum_i A_i grad log pi(y_i)."""
    if estimator.startswith("mean"):
        return mean_advantages(rewards) * (rewards.shape[-1] if estimator == "mean x k" else 1)
    return k_sample_advantages(pass_at_k, rewards, k=rewards.shape[-1], estimator=estimator)


# ---------------------------------------------------------------------------------------------------------------------


def exact_metrics(log_pi: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Mean reward, max@k and KL from the uniform policy, (3, S) float64, of S policies log_pi (S, arms).

    rewards: (S, arms), sorted upwards. With F the cumulative probability, max@k = sum_a r_a (F_a^k - F_{a-1}^k)."""
    pi = log_pi.exp()
    mean = (pi * rewards).sum(-1)
    F = pi.cumsum(-1).clamp(max=1)  # (S, arms)
    best = (rewards * torch.diff(F**k, dim=-1, prepend=torch.zeros_like(F[:, :1]))).sum(-1)
    kl = (pi * (log_pi + math.log(pi.shape[-1]))).sum(-1)
    return torch.stack([mean, best, kl])


def trajectory(args: Args, estimator: str) -> torch.Tensor:
    """Exact metrics along training, (steps + 1, 3, seeds) float64. The same arms for every estimator."""
    generator = torch.Generator().manual_seed(args.seed)
    rewards = torch.randn(args.seeds, args.arms, generator=generator, dtype=torch.float64).sort(-1).values
    theta = torch.zeros_like(rewards)
    metrics = [exact_metrics(theta.log_softmax(-1), rewards, args.k)]
    for _ in tqdm(range(args.steps), desc=estimator, unit="step"):
        pi = theta.softmax(-1)
        y = torch.multinomial(pi, args.k, replacement=True, generator=generator)  # (S, k)
        A = advantages(rewards.gather(-1, y), estimator)  # (S, k)
        # grad_theta sum_i A_i log pi(y_i) = sum_i A_i (onehot(y_i) - pi)
        theta = theta.scatter_add(-1, y, args.lr * A) - args.lr * A.sum(-1, keepdim=True) * pi
        metrics.append(exact_metrics(theta.log_softmax(-1), rewards, args.k))
    return torch.stack(metrics)


def mean_at_kl(metrics: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Mean reward (len(grid), G) at the point of training where the KL reaches each value of `grid`, nan where it never
    does. The curves are averaged over G groups of seeds first: a single seed's KL jumps. Linear between steps."""
    groups = torch.stack([part.mean(-1) for part in metrics.chunk(GROUPS, -1)], -1)  # (steps + 1, 3, S) -> (.., 3, G)
    reward, kl = groups[:, 0].T.numpy(), groups[:, 2].cummax(0).values.T.numpy()  # (G, steps + 1)
    at = [np.interp(grid, *path, right=np.nan) for path in zip(kl, reward)]
    return torch.tensor(np.array(at)).T


def save_figure(path: Path, runs: dict[str, torch.Tensor], grid: torch.Tensor, k: int) -> None:
    """The three panels of Figure 1, with 95% bands."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, metrics in runs.items():
        steps = torch.arange(len(metrics))
        at_kl = mean_at_kl(metrics, grid)  # (len(grid), G)
        for axis, x, y in zip(axes, (steps, grid, steps), (metrics[:, 0], at_kl, metrics[:, 1])):
            mean, ci = mean_and_interval(y.mT)
            axis.plot(x, mean, label=name)
            axis.fill_between(x, mean - ci, mean + ci, alpha=0.25)
    axes[0].set(xlabel="step", ylabel="mean reward", title="mean reward")
    axes[1].set(xlabel="KL from the uniform policy (nats)", ylabel="mean reward", title="mean reward at equal KL")
    axes[2].set(xlabel="step", ylabel=f"max@{k}", title=f"pass@k: best of {k}")
    axes[0].legend()
    save_and_close(figure, path)


def main(args: Args) -> None:
    for name, least in {"k": 2, "arms": 2, "steps": 1, "seeds": 2}.items():
        if getattr(args, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(args, name)}")
    runs = {name: trajectory(args, name) for name in ("mean", "mean x k", "unbiased", "biased")}
    grid = torch.linspace(0, 3, 61, dtype=torch.float64)
    print(f"\nafter {args.steps} steps; ± is a 95% interval over {args.seeds} seeds (Student's t)")
    rows = [[name, *(number(*mean_and_interval(x)) for x in metrics[-1])] for name, metrics in runs.items()]
    print(table([["advantages", "mean reward", f"max@{args.k}", "KL"], *rows]))
    if args.figure:
        save_figure(args.figure, runs, grid, args.k)
        print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    run_cli(main, Args)
