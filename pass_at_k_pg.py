"""Policy gradient for pass@k: train for at least one right response in k tries. See docs/pass_at_k.md.

Tang, Zheng, Synnaeve, Munos. Optimizing Language Models for Inference Time Objectives using Reinforcement Learning.
ICML 2025, arXiv 2503.19595. The objective, over k independent responses to a prompt,

    J_k = E_x E_{y_1..y_k ~ pi(.|x)} [ max_i r(x, y_i) ]        (pass@k for 0/1 rewards, max@k for real ones)

and its gradient estimate, sum_i A_i grad log pi(y_i), with the leave-one-out advantages of their Lemma 1,

    A_i = max_j r_j - max_{j != i} r_j

What differs from plain policy gradient: (1) the k responses to a prompt are one sample of the objective, which is never
split; (2) the advantages below; (3) nothing is divided by a standard deviation or a length.

    python pass_at_k_pg.py --k 4                      # unbiased; pass@4 rises
    python pass_at_k_pg.py --k 4 --estimator mean     # the baseline: pass@1 rises, pass@32 falls
    python pass_at_k_pg.py --k 4 --estimator maxrl    # MaxRL (arXiv 2602.02710): all k; --k only chooses columns
    python pass_at_k_pg.py --k 4 --estimator recipes/all_right.py:all_right    # your own file, see docs/own.md
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import common
from common import checked_rewards, mean_advantages
from harness.load_file import load_estimator
from harness.parallel import average_gradients
from harness.run import Run, RunArgs, keep_file, rollout_metrics, run_cli, sizes_up_to
from verifiers import BadInput

NAMES = ("mean", "unbiased", "biased", "maxrl")


@dataclass
class Args(RunArgs):
    k: int = 4  # samples that the objective takes the best of
    n: int | None = None  # samples per prompt; more than k lowers the variance (default: 16, or k if k is larger)
    estimator: Literal[NAMES] | str = "unbiased"
    """mean: the mean reward (RLOO, the baseline). unbiased: pass@k. biased: unbiased minus its mean, which ascends
    pass@(k-1). maxrl: MaxRL. FILE:NAME: your own function (rewards (B, n), k) -> advantages (B, n), see docs/own.md"""
    kl_coef: float = 0.0  # beta of -beta KL(policy || initial policy), added to the objective
    log_kl: bool = False  # log this KL when beta is 0; it takes a copy of the policy and a forward pass
    epochs: int = 1  # optimiser steps on the same rollouts; PPO clipping applies from 2 on
    clip: float = 0.2  # epsilon of PPO clipping


# --- copy this, with checked_rewards and mean_advantages of common.py ------------------------------------------------


def advantages(rewards: torch.Tensor, k: int, estimator: str = "unbiased") -> torch.Tensor:
    """Advantages A of the pass@k policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over the n samples.

      mean      A_i = (1/n) (r_i - mean_{j != i} r_j)                                                        (RLOO)
      unbiased  A_i = (k/n) mean over k-subsets T containing i of [ max T - max (T without i) ]; k = 1: as mean  (Tang)
      biased    as unbiased, minus the mean advantage of each subset: the gradient of pass@(k-1); 0 for k = 1 (Tang)
      maxrl     sum_{j=2..n} biased_j / (j-1), whatever k is; if c of n rewards are 1 and the others 0: (r_i - c/n) / c,
                and 0 for c = 0                                                                             (MaxRL)

    rewards: (B, n), n >= k, any real numbers. Returns (B, n) of the same dtype (float32 for integers and bools).
    Raises ValueError unless 1 <= k <= n, for rewards that are not finite, and for an unknown estimator.
    Example: rewards 0, 1, .5. For k = 3 only the best sample has an advantage: A = 0, 1 - .5, 0. For k = 2 it adds 1
    and .5 to its two pairs: A = (2/3) (1 + .5)/2 = .5. The second best adds .5 to one: A = (2/3) .5/2 = 1/6."""
    rewards, n = checked_rewards(rewards, k), rewards.shape[-1]
    if estimator == "mean" or (estimator == "unbiased" and k == 1):
        return mean_advantages(rewards)
    if estimator == "maxrl":
        return sum((advantages(rewards, j, "biased") / (j - 1) for j in range(2, n + 1)), torch.zeros_like(rewards))
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"unknown estimator {estimator!r}: choose mean, unbiased, biased or maxrl")
    # Sorted upwards, with d_l = r_(l+1) - r_(l). Of the k-subsets with a given member above the l lowest, the share
    # p_l = C(l, k-1) / C(n-1, k-1) has all its others among these l (PKPO, arXiv 2505.15201, "loo-1"):
    #   unbiased  A_(i) = (k/n) sum_{l < i} d_l p_l
    #   biased    A_(i) = ((k-1)/n) [ sum_{l < i} d_l p_l - sum_{l >= i} d_l p_l (n-l)/l ]
    r, order = rewards.double().sort(dim=-1)
    l = torch.arange(1, n, dtype=torch.float64, device=rewards.device)  # (n-1,): 1 .. n-1
    # p_l in product form: p_{n-1} = 1 and p_{l-1} = p_l (l-k+1)/l; it neither overflows nor cancels
    p = torch.cat([((l[1:] - k + 1) / l[1:]).clamp(min=0).flip(0).cumprod(0).flip(0), torch.ones_like(l[:1])])
    gap = r.diff(dim=-1) * p  # (B, n-1): d_l p_l
    lower = torch.nn.functional.pad(gap.cumsum(-1), (1, 0))  # (B, n): the sum over l < i
    if estimator == "unbiased":
        A = k / n * lower
    else:
        upper = (gap * (n - l) / l).flip(-1).cumsum(-1).flip(-1)
        higher = torch.nn.functional.pad(upper, (0, 1))  # (B, n): the sum over l >= i
        A = (k - 1) / n * (lower - higher)
    return torch.empty_like(A).scatter_(-1, order, A).to(rewards.dtype)


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.n = max(args.k, 16) if args.n is None else args.n
    name, estimate, metric = args.estimator, partial(advantages, estimator=args.estimator), None
    if name not in NAMES:
        if ":" not in name:
            raise BadInput(f"--estimator must be {', '.join(NAMES)} or FILE:NAME, not {name!r}")
        estimate, metric, digest = load_estimator(name)
        keep_file(args, name, digest)
        name = name.rpartition(":")[2]
    run = Run(args, args.task, args.model, name, f"k{args.k}", f"n{args.n}", f"s{args.seed}")
    estimate(torch.ones(args.n + 1, args.n).tril(-1), args.k)  # a file that fails on 0/1 rewards does so at once
    policy, ks = run.policy, sizes_up_to(args.eval_n, args.k)
    measured = {"pass": common.pass_at_k} | ({"metric": metric} if metric else {})
    initial = run.reference("initial") if args.kl_coef or args.log_kl else None

    def metrics(verdict):
        return {f"{x}@{j}": m(verdict.rewards, j) for x, m in measured.items() for j in ks}  # each (P,)

    for step in run.steps(metrics, f"{name} k={args.k}"):
        problems, prompts, generator = run.batch(step)
        rollouts = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
        verdict = run.verdict(problems, common.decode(policy, rollouts))
        with run.saved_if_this_fails():
            A = estimate(verdict.rewards, args.k)  # (B, n)
            record = {f"{x}@{args.k}": m(verdict.rewards, args.k).mean().item() for x, m in measured.items()}
        record |= rollout_metrics(policy, rollouts, verdict, A)
        if initial:
            ratios = common.log_ratios(policy, initial, rollouts)  # (B, n, T)
            record["kl"] = common.kl_estimate(ratios)
            A = A + args.kl_coef * common.kl_advantages(ratios) if args.kl_coef else A  # Tang: J_k - beta KL
        record |= common.policy_gradient_step(
            policy, run.optimizer, rollouts, A, args.max_grad_norm, args.epochs, args.clip, average_gradients
        )
        run.log(step, rollouts, verdict, record, ("reward", f"pass@{args.k}", "kl", "tokens_per_s"))
    run.finish([f"{x}@{j}" for x in measured for j in sorted({1, args.k, args.eval_n})], args.k)


if __name__ == "__main__":
    run_cli(main, Args)
