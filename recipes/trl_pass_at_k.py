"""pass@k training in TRL's GRPOTrainer or RLOOTrainer, neither of them modified: a reward function is enough.

A reward function of TRL sees all completions of a group at once, so it can return advantages instead of rewards. TRL
then subtracts the group's mean. Which of our estimators come out as they went in (n samples, group mean 0 or not):

  mean                 sums to zero over a group: unchanged
  biased, any n >= k   sums to zero over every k-subset: unchanged; its expectation is the gradient of pass@(k-1)
  unbiased             sums to k (M_k - M_{k-1}), M_j the group's pass@j: changed. What is left of it is
                       (1 - k/n) biased(k+1) + (k/n) biased(k), whose expectation mixes the gradients of pass@k and of
                       pass@(k-1); at n = k it is biased(k)

So this recipe returns biased(k+1), whose expectation is exactly the gradient of pass@k; it takes n >= k+1. For all
estimators as they are, see trl_k_sample.py. scale makes it our loss -(1/B) sum_b sum_i A_bi log pi(y_bi):

  GRPOTrainer   loss_type="dr_grpo" divides by rows times max_completion_length: scale = n * max_completion_length
                (the default "dapo" divides by the batch's tokens, "grpo" by each response's length: other objectives)
  RLOOTrainer   divides by rows, and its leave-one-out baseline multiplies by n/(n-1): scale = n - 1

    config = GRPOConfig("out", num_generations=8, loss_type="dr_grpo", scale_rewards="none", max_completion_length=512)
    reward = pass_at_k_reward(verify, n=8, k=4, scale=8 * 512)
    GRPOTrainer("Qwen/Qwen2.5-0.5B", reward, config, dataset).train()

It must be the only reward function, and no reward may be clipped (RLOO's reward_clip_range) or normalised. What a
process generates at once must be a multiple of n.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # or paste pass_at_k_pg.advantages, one function of one tensor

import torch

from pass_at_k_pg import advantages


def pass_at_k_reward(verify: Callable, n: int, k: int, scale: float) -> Callable:
    """verify(prompts, completions, **columns of the dataset): one true reward per completion. n: num_generations."""

    def pass_at_k(prompts, completions, log_metric, **columns) -> list[float]:
        if len(prompts) % n or any(prompts[i] != prompts[i - i % n] for i in range(len(prompts))):
            raise ValueError(f"groups of {n} are split: make the batch of each process a multiple of num_generations")
        rewards = torch.tensor(verify(prompts, completions, **columns), dtype=torch.float64).view(-1, n)  # (B, n)
        log_metric("true_reward", rewards.mean().item())  # TRL's "reward" shows the advantages, zero on average
        return (scale * advantages(rewards, k + 1, "biased")).flatten().tolist()

    return pass_at_k
