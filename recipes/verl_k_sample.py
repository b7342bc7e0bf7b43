r"""Every estimator of this repository in verl, by its registry of advantage estimators (written for verl 0.9.1).

A module of yours, say my_objective.py, names an objective, and verl imports it in the process of its trainer:

    from verl_k_sample import majority, packed, partial, pass_at_k, register, vote
    register("pass_at_4", partial(pass_at_k, k=4))

    VERL_USE_EXTERNAL_MODULES=my_objective python -m verl.trainer.main_ppo algorithm.adv_estimator=pass_at_4 \
        actor_rollout_ref.rollout.n=16 actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum ...

  objective                                   what the reward function returns
  partial(pass_at_k, k=4)                     any reward       estimator="unbiased", or "biased", "maxrl", "mean"
  partial(majority, k=8)                      packed(right, vote(answer)), answer being None or hashable
  partial(best_of_n, N=8)                     packed(right, score), score > 0, as the sigmoid of a reward model's is
  partial(best_of_n, N=8, estimator="rlb-p")      packed(right, 1 + right): the reward itself selects
  partial(k_sample, metric, k=4)              any reward       an objective of your own, see common.k_sample_advantages

The gradient is that of our loss -(1/B) sum_b sum_i A_bi log pi(y_bi) if verl's loss is "vanilla", aggregated by
"seq-mean-token-sum", which is a sum over tokens divided by rows, n = rollout.n of them to a prompt: A is multiplied by
n. The default "token-mean" divides by the batch's tokens, others by each response's length. It also takes
ppo_mini_batch_size = train_batch_size and ppo_epochs=1 (else PPO's clipping comes in), entropy_coeff=0,
use_kl_loss=False, top_p=1, top_k=-1, and one response a rollout. use_kl_in_reward is refused, as the KL would go
through the maximum or the vote.
"""

import sys
import zlib
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # or paste these functions and what goes with them

import torch
from verl.trainer.ppo.core_algos import register_adv_est

import bon_rl
import majority_pg
from common import k_sample_advantages as k_sample
from pass_at_k_pg import advantages as pass_at_k

__all__ = ["best_of_n", "k_sample", "majority", "packed", "partial", "pass_at_k", "register", "vote"]


def vote(answer: Hashable | None) -> int:
    """0 for no answer, else 1 to 2^24 - 1, what float32 holds, by a hash: of 16 different answers two share a number
    with a chance of 7 in a million."""
    return 0 if answer is None else zlib.crc32(repr(answer).encode()) % (2**24 - 1) + 1


def packed(right: bool, other: float) -> float:
    """A 0/1 reward, as the sign, and a vote or score, as the size, in the one float32 that verl has for a response."""
    if not (0 < other < float("inf") or (other == 0 and not right)):
        raise ValueError(f"a score must be positive and finite, not {other}; a vote 0 cannot be right")
    return other if right else -other


def majority(values: torch.Tensor, k: int, estimator: str = "biased") -> torch.Tensor:
    """values: (B, n) of `packed` numbers. Returns (B, n); see majority_pg.advantages."""
    votes = values.abs().long() - (values == 0).long()  # 0, no answer, becomes -1
    return majority_pg.advantages(votes, (values > 0).to(values), k, estimator)


def best_of_n(values: torch.Tensor, N: int, estimator: str = "exact") -> torch.Tensor:
    """values: (B, n) of `packed` numbers. Returns (B, n); see bon_rl.advantages."""
    return bon_rl.advantages((values > 0).to(values), values.abs(), N, estimator)


def register(name: str, advantages: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Put an objective, from (B, n) to (B, n), into verl's registry. Returns the estimator, which raises ValueError."""

    @register_adv_est(name)
    def estimator(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index, config=None, **_):
        """token_level_rewards, response_mask: (R, T). index: (R,), equal for the samples of one prompt, which need not
        be neighbours nor equally many; rows without a token are verl's padding. Returns (R, T) twice."""
        if config is not None and config.get("use_kl_in_reward"):
            raise ValueError("set algorithm.use_kl_in_reward=False: the KL would go through the objective")
        groups, values = {}, token_level_rewards.sum(-1)  # (R,)
        for row in response_mask.any(-1).nonzero()[:, 0].tolist():
            groups.setdefault(index[row], []).append(row)
        A, n = torch.zeros_like(values), max(map(len, groups.values()))
        for rows in groups.values():
            A[rows] = n * advantages(values[rows].unsqueeze(0))[0].to(A)
        A = A.unsqueeze(-1) * response_mask  # (R, T)
        return A, A

    return estimator
