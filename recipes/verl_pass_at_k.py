"""pass@k training in verl: an advantage estimator for its registry.

    register_pass_at_k(k=4)          # in the process that runs the trainer (Ray's task runner); then
    algorithm.adv_estimator=pass_at_k actor_rollout_ref.rollout.n=8
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum

verl uses a registered estimator as it is, without centring or scaling it. Its loss "seq-mean-token-sum" is a mean over
the rows of the global batch, so the advantages here are n times ours, which makes it our loss
-(1/B) sum_b sum_i A_bi log pi(y_bi); the default "token-mean" divides by the batch's tokens. verl's own `grpo_passk` is
`unbiased` for n = k, if norm_adv_by_std_in_grpo is switched off.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # or paste pass_at_k_pg.advantages, one function of one tensor

import torch

from pass_at_k_pg import advantages

try:
    from verl.trainer.ppo.core_algos import register_adv_est
except ImportError:  # verl is not installed: `register_pass_at_k` takes another decorator, for a test
    register_adv_est = None


def register_pass_at_k(k: int, estimator: str = "unbiased", name: str = "pass_at_k", register=register_adv_est):
    """Put the estimator of pass_at_k_pg.advantages into verl's registry under `name`; returns the function."""
    if register is None:
        raise ImportError("verl is not installed")

    @register(name)
    def pass_at_k(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index, config=None, **_):
        """token_level_rewards, response_mask: (rows, T); index: (rows,), equal for the samples of one prompt, which
        need not be neighbours. Returns advantages and returns, (rows, T) each."""
        rewards, groups = token_level_rewards.sum(-1), {}  # (rows,)
        for row, group in enumerate(index):
            groups.setdefault(group, []).append(row)
        A = torch.empty_like(rewards)
        for rows in groups.values():
            A[rows] = len(rows) * advantages(rewards[rows].unsqueeze(0), k, estimator)[0]
        A = A.unsqueeze(-1) * response_mask
        return A, A

    return pass_at_k
