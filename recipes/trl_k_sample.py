"""Every estimator of this repository in TRL's GRPOTrainer, whose advantages are replaced (written for trl 1.16.0).

A reward function of TRL returns one number per completion. Here each one's numbers become a tensor (B, n), n samples to
each of B prompts, and `advantages` makes (B, n) advantages of them, whatever processes and micro-batches the rows lie
in. All else stays TRL's: generation, vLLM, PEFT, accelerate, logging, resume.

    config = GRPOConfig(
        "out", loss_type="dr_grpo", num_generations=16, per_device_train_batch_size=16, max_completion_length=512
    )
    KSampleTrainer("Qwen/Qwen2.5-0.5B", verify, config, dataset, advantages=partial(pass_at_k, k=4)).train()

  advantages                                    reward functions
  partial(pass_at_k, k=4)                       verify       estimator="unbiased", or "biased", "maxrl", "mean"
  partial(majority, k=8, estimator="biased")    verify, vote_of(answer), where answer(completion) is None or hashable
  partial(best_of_n, N=8, estimator="exact")    verify, scores of a reward model (or a model itself, see TRL)
  partial(k_sample, metric, k=4)                those that the metric takes, in its order: an objective of your own

The gradient is that of our loss -(1/B) sum_b sum_i A_bi log pi(y_bi) under the settings in EXACT, which are checked, if
dropout is off, LoRA's too, and beta and entropy_coef are 0: they add terms of TRL's own. The loss "dr_grpo" divides by
rows times max_completion_length, and A carries n max_completion_length; scale_rewards has no effect. num_iterations > 1
uses samples again under PPO clipping, as our --epochs does. With vLLM, TRL multiplies a response's loss by the ratio of
the trainer's probability to vLLM's, by 0 where it exceeds 3. The logged "reward" is that of the first function.
"""

import sys
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # or paste these functions and what goes with them

import torch
from trl import GRPOTrainer

import majority_pg
from bon_rl import advantages as best_of_n
from common import k_sample_advantages as k_sample
from pass_at_k_pg import advantages as pass_at_k

__all__ = ["KSampleTrainer", "best_of_n", "k_sample", "majority", "pass_at_k", "vote_of"]
EXACT = dict(loss_type="dr_grpo", importance_sampling_level="token", off_policy_mask_threshold=None, top_p=1.0)
EXACT |= dict(top_entropy_quantile=1.0, mask_truncated_completions=False, top_k=0, min_p=None, repetition_penalty=1.0)


def majority(rewards: torch.Tensor, votes: torch.Tensor, k: int, estimator: str = "biased") -> torch.Tensor:
    return majority_pg.advantages(votes.nan_to_num(-1).long(), rewards, k, estimator)  # TRL makes nan of None


def vote_of(answer: Callable[..., Hashable | None]) -> Callable:
    """A reward function: a hash of each answer's repr, the same in all processes. It has the 24 bits that float32 can
    hold: among 16 different answers to a prompt two are taken for one with a chance of 7 in a million."""

    def vote(completions, **_):
        return [None if a is None else zlib.crc32(repr(a).encode()) % 2**24 for a in map(answer, completions)]

    return vote


class KSampleTrainer(GRPOTrainer):
    def __init__(self, *args, advantages: Callable[..., torch.Tensor], **kwargs):
        """advantages: of (B, n) float32 from each reward function, returns (B, n). Raises ValueError, see EXACT."""
        super().__init__(*args, **kwargs)
        self.advantages, given = advantages, vars(self.args)
        wrong = [f"{name} must be {x!r}, not {given[name]!r}" for name, x in EXACT.items() if given[name] != x]
        if self.args.gradient_accumulation_steps % self.args.steps_per_generation:  # else groups are torn apart
            wrong.append("gradient_accumulation_steps must be a multiple of steps_per_generation")
        if wrong:
            raise ValueError(f"with these settings the gradient is another one: {'; '.join(wrong)}")
        self.reward_weights[1:] = 0  # of the logged "reward" alone

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)  # (R, functions): of all processes, a prompt's n in a row
        return self.rewards

    def _generate_and_score_completions(self, inputs):
        batch, n = super()._generate_and_score_completions(inputs), self.num_generations
        if self.model.training:
            A = self.advantages(*self.rewards.T.unflatten(-1, (-1, n))).flatten()  # each (B, n) -> (B, n) -> (R,)
            self._logs["advantages"].extend(A.tolist())  # in the place of TRL's, in the table of log_completions
            mine = A[self.accelerator.process_index * len(inputs) :][: len(inputs)]
            batch["advantages"] = n * self.max_completion_length * mine.to(batch["advantages"])
        return batch
