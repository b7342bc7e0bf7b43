"""Policy gradient for majority voting: the most frequent of k answers is right. See docs/majority.md.

Tang, Zheng, Synnaeve, Munos. Optimizing Language Models for Inference Time Objectives using Reinforcement Learning.
ICML 2025, arXiv 2503.19595. The objective, over k independent responses to a prompt with final answers a_1..a_k,

    J_k = E_x E_{y_1..y_k ~ pi(.|x)} [ r(maj(a_1, .., a_k)) ]        (maj@k; a tied vote is worth the mean of the tied)

and its gradient estimate, sum_i A_i grad log pi(y_i), with the leave-one-out advantages of their Lemma 1,

    A_i = r(maj(a_1..a_k)) - r(maj(a_{-i}))

A response matters only where removing its vote changes the outcome. Unlike pass_at_k_pg.py: the advantages depend on
votes as well as rewards; a KL penalty is on, because majority and mean training reach the same policy without it. A
reward for agreement with the vote is another objective: docs/majority.md.

    python majority_pg.py --k 8                      # biased: the gradient of maj@7
    python majority_pg.py --k 8 --estimator mean     # the baseline
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common
from common import checked_rewards, k_sample_advantages, mean_advantages
from harness.parallel import average_gradients
from harness.run import Run, RunArgs, rollout_metrics, run_cli, sizes_up_to


@dataclass
class Args(RunArgs):
    k: int = 8  # votes that the objective counts
    n: int | None = None  # samples per prompt; more than k lowers the variance (default: 16, or k if k is larger)
    estimator: Literal["mean", "unbiased", "biased"] = "biased"
    """mean: the mean reward (RLOO). unbiased: maj@k. biased: unbiased minus its mean, which ascends maj@(k-1)"""
    kl_coef: float = 0.3  # beta of -beta KL(policy || initial policy), added to the objective
    log_kl: bool = False  # log this KL when beta is 0; it takes a copy of the policy and a forward pass
    epochs: int = 1  # optimiser steps on the same rollouts; PPO clipping applies from 2 on
    clip: float = 0.2  # epsilon of PPO clipping


# --- copy this, with checked_rewards, mean_advantages and k_sample_advantages of common.py ---------------------------


def advantages(votes: torch.Tensor, rewards: torch.Tensor, k: int, estimator: str = "unbiased") -> torch.Tensor:
    """Advantages A of the maj@k policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over the n samples.

      mean      A_i = (1/n) (r_i - mean_{j != i} r_j)                                                        (RLOO)
      unbiased  A_i = (k/n) mean over k-subsets T containing i of [ f(T) - f(T without i) ]             (n = k: Tang)
      biased    as unbiased, minus the mean advantage of each subset: the gradient of maj@(k-1); 0 for k = 1  (Tang)

    f is the reward of the majority, see `majority_at_k`. votes: (B, n) int64, n >= k, equal = same answer, -1 = none.
    rewards: (B, n). Returns (B, n), of the dtype of rewards (float32 for integers and bools). Raises ValueError unless
    1 <= k <= n, for rewards that are not finite, and for an unknown estimator."""
    rewards = checked_rewards(rewards, k)
    if estimator == "mean":
        return mean_advantages(rewards)
    return k_sample_advantages(majority_at_k, votes, rewards, k=k, estimator=estimator).to(rewards.dtype)


def majority_at_k(votes: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """maj@k: the reward of the most voted answer, its mean over all k-subsets of n samples, exactly.

    votes: (B, n) int64, equal = same answer, -1 = no answer (casts no vote; a subset without votes is worth 0).
    rewards: (B, n), a function of the answer; where it is not, the mean reward of the answer's samples counts. Tied
    answers are worth their mean. Returns (B,) float64 on the rewards' device. Raises ValueError as `advantages`.
    Example: of three samples two give a right answer and one a wrong one, k = 2. The pairs are worth 1 (both right),
    1/2 and 1/2 (ties): maj@2 = 2/3."""
    rewards, n = checked_rewards(rewards, k), votes.shape[-1]
    # Subsets are counted, not listed. Each sample is drawn with chance p. If k are drawn, all k-subsets are equally
    # likely. p near k/n makes k the likeliest number; nothing that matters underflows. Rows of one pattern are counted
    # once: in leave-one-out, all samples of an answer leave the same others.
    patterns, row = answer_patterns(votes, rewards).unique(dim=0, return_inverse=True)  # (U, 2, n), (B,)
    count, reward = patterns[:, 0].long(), patterns[:, 1]  # (U, n) each
    p = k / (n + 1)
    chance = torch.zeros(n + 1, k + 1, dtype=torch.float64)  # [c, u]: u of c samples are drawn, by Pascal's rule
    chance[0, 0] = 1
    for c in range(n):
        chance[c + 1] = (1 - p) * chance[c]
        chance[c + 1, 1:] += p * chance[c, :-1]
    value = torch.zeros(len(count), dtype=torch.float64)  # (U,)
    for t in range(1, min(k, int(count.max())) + 1):  # the votes that win
        most = n - (count - t).clamp(min=0).sum(-1)  # (U,): the largest subset in which no answer has more than t
        some = (count[:, 0] >= t) & (most >= k)  # (U,): the patterns, S of them, that t votes can win
        if not some.any():
            continue
        able = count[some].where(count[some] >= t, 0)  # (S, n): an answer with fewer samples cannot have t votes
        answers = int((able > 0).sum(-1).max())
        # ways[value?, m answers tied at t, s samples drawn]: the chance, and the chance times the rewards of the tied
        ways = torch.zeros(len(able), 2, min(answers, k // t) + 1, k + 1, dtype=torch.float64)
        ways[:, 0, 0, 0] = 1
        for a in range(answers):
            ways = with_answer(ways, chance[able[:, a], : t + 1], reward[some, a])
        mean = (ways[:, 1, 1:] / torch.arange(1, ways.shape[2]).unsqueeze(-1)).sum(1)  # (S, k+1): reward of the tied
        rest = chance[n - able.sum(-1)].flip(-1)  # (S, k+1): chance that k - s others, which cannot win, are drawn
        value[some] += (mean * rest).sum(-1)
    return (value / chance[n, k])[row].to(rewards.device)


def with_answer(ways: torch.Tensor, drawn: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """One more answer joins the count: new[m, s] = sum_{u < t} P(u) ways[m, s-u] + P(t) ways[m-1, s-t].

    ways: (S, 2, ties+1, k+1), see `majority_at_k`. drawn: (S, t+1), P(u) that u of the answer's samples are drawn.
    reward: (S,), of the answer, added to the value where the answer ties. All float64; new has the shape of ways."""
    P, t = drawn[:, None, None, :, None], drawn.shape[-1] - 1  # (S, 1, 1, t+1, 1)
    new = P[..., 0, :] * ways
    for u in range(1, t):
        new[..., u:].addcmul_(ways[..., :-u], P[..., u, :])
    tied = P[..., t, :] * ways[:, :, :-1, :-t]  # (S, 2, ties, k+1-t)
    tied[:, 1] += reward.view(-1, 1, 1) * tied[:, 0]
    new[:, :, 1:, t:] += tied
    return new


def answer_patterns(votes: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """What the majorities of a row depend on: votes and rewards, (B, n) each -> (B, 2, n) float64 on the CPU.

    [:, 0]: number of samples of each answer, largest first, then zeros. [:, 1]: the answers' mean rewards."""
    votes, order = votes.cpu().sort(dim=-1)
    rewards = rewards.cpu().double().gather(-1, order)
    answer = torch.nn.functional.pad((votes.diff(dim=-1) != 0).cumsum(-1), (1, 0))  # (B, n): 0, 0, 1, ...
    count = torch.zeros_like(rewards).scatter_add(-1, answer, (votes >= 0).double())
    mean = torch.zeros_like(rewards).scatter_add(-1, answer, rewards) / count.clamp(min=1)
    order = mean.argsort(dim=-1)  # equal counts are put in the order of their rewards
    order = order.gather(-1, count.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return torch.stack([count, mean], 1).gather(-1, order.unsqueeze(1).expand(-1, 2, -1))


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.n = max(args.k, 16) if args.n is None else args.n
    run = Run(args, args.task, args.model, args.estimator, f"k{args.k}", f"n{args.n}", f"s{args.seed}")
    policy, ks = run.policy, sizes_up_to(args.eval_n, args.k)
    initial = run.reference("initial") if args.kl_coef or args.log_kl else None

    def metrics(verdict):
        passes = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        return passes | {f"maj@{j}": majority_at_k(verdict.votes, verdict.rewards, j) for j in ks}

    for step in run.steps(metrics, f"{args.estimator} k={args.k}"):
        problems, prompts, generator = run.batch(step)
        rollouts = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
        verdict = run.verdict(problems, common.decode(policy, rollouts))
        A = advantages(verdict.votes, verdict.rewards, args.k, args.estimator)  # (B, n)
        record = {f"maj@{args.k}": majority_at_k(verdict.votes, verdict.rewards, args.k).mean().item()}
        record |= rollout_metrics(policy, rollouts, verdict, A)
        if initial:
            ratios = common.log_ratios(policy, initial, rollouts)  # (B, n, T)
            record["kl"] = common.kl_estimate(ratios)
            A = A + args.kl_coef * common.kl_advantages(ratios) if args.kl_coef else A  # Tang: J_k - beta KL
        record |= common.policy_gradient_step(
            policy, run.optimizer, rollouts, A, args.max_grad_norm, args.epochs, args.clip, average_gradients
        )
        run.log(step, rollouts, verdict, record, ("reward", f"maj@{args.k}", "kl", "tokens_per_s"))
    run.finish([*(f"maj@{j}" for j in sorted({1, args.k, args.eval_n})), f"pass@{args.eval_n}"], args.k)


if __name__ == "__main__":
    run_cli(main, Args)
