"""What one pass over equal prompts saves of a whole training step (common.response_log_probs), beside one pass a row.

    python benchmarks/prompts.py

A step samples and updates a Llama of `tiny`'s shape with random weights. `plain` is the path taken where activations
are recomputed: without a cache, each row reads its prompt again. The two take turns.
"""

from dataclasses import dataclass

import measure  # first: puts the repository on the path
import torch
import tyro

import common
from harness.policy import TINY

CASES = {  # prompts, samples, tokens of a prompt, tokens of a response
    "tiny on arithmetic": (64, 16, 6, 8),
    "with a scratchpad": (32, 16, 15, 16),
    "a few-shot prompt": (8, 16, 100, 16),
}


@dataclass
class Args:
    rounds: int = 5
    """steps in each case, in turn, after one that is not counted"""
    threads: int = 1
    """CPU threads"""
    json: str | None = None
    """write the numbers to this file, too"""


def main(args: Args) -> None:
    machine, rows, results = measure.describe_machine(args.threads), [], {}
    policy = measure.tiny_policy("cpu", TINY["hidden_size"], TINY["num_hidden_layers"])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4, fused=True)
    for case, (B, n, P, T) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(5, 90, (B, P), generator=generator).tolist()
        for signal in (1.0, 0.2):
            A = torch.randn(B, n, generator=generator) * (torch.rand(B, n, generator=generator) < signal)

            def step(plain: bool) -> None:
                rollouts = common.sample(policy, prompts, n, T, 1.0, generator)
                policy.model.gradient_checkpointing = plain  # the mark alone: nothing is recomputed
                common.policy_gradient_step(policy, optimizer, rollouts, A)
                policy.model.gradient_checkpointing = False

            seconds = measure.interleaved({"plain": lambda: step(True), "shared": lambda: step(False)}, args.rounds)
            ratios = [plain / shared for plain, shared in zip(seconds["plain"], seconds["shared"])]
            results[f"{case}, {signal:.0%}"] = seconds
            middle = [f"{measure.quartiles(seconds[name])[0]:.3f}" for name in ("plain", "shared")]
            rows.append([f"{case}: {B} x {n}, {P} + {T} tokens", f"{signal:.0%}", *middle, measure.spread(ratios)])
    measure.print_table(["a whole step", "signal", "plain s", "shared s", "plain / shared"], rows)
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
