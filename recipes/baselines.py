"""Unbiased estimators of the gradient of pass@k that differ in their baseline alone, for --estimator FILE:NAME."""

import torch

from pass_at_k_pg import advantages


def u(rewards, k):
    return advantages(rewards, k)


def b(rewards, k):
    return advantages(rewards, k + 1, "biased")  # n > k


def others(rewards, k):
    s = (rewards.shape[-1] - k) / (rewards.shape[-1] - 1)
    return (1 - s) * u(rewards, k) + (s * b(rewards, k) if s else 0)


def posterior(rewards, k):  # for rewards 0 and 1
    n, m = rewards.shape[-1], rewards.sum(-1, keepdim=True) - rewards  # (B, n): m of the others are right
    worth = u(torch.ones(n, n).to(rewards).tril(), k)[:, 0]  # (n,): of a right one, with m = 0..n-1 others right
    return worth[m.long()] * (rewards - (m + 1) / (n + 1))
