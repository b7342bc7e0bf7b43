"""Seconds of one optimisation step, beside TRL's GRPOTrainer and RLOOTrainer.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/step.py
    python benchmarks/step.py --model runs/smollm2 --prompts 8 --tokens 12      # on the task `sums`, see pretrained.py

Ours is the step of pass_at_k_pg.py: sample, decode and verify, advantages, policy_gradient_step (without a KL, which
needs a copy of the policy; TRL with beta = 0 has none either). TRL runs its own `train()`; a callback
reads the clock at on_step_begin and on_step_end and, after each of its steps, runs one of ours. Both have the
same weights (random, or those of --model), prompts, samples a prompt, response length (no response ends early),
verifier, AdamW and gradient clipping. The reward is the same seeded draw, whatever the text says:

  (a) 0/1 with solve rates like the embedded task's; ours skips the rows that pass@k gives no advantage
  (b) uniform in [0, 1) with the estimator `mean`: every row carries a signal

TRL is set to be fast: float32, one forward and backward pass for all rows, no gradient checkpointing, beta = 0 (no
reference model), no logging, evaluation or saving, no workers, fused AdamW (its default), transformers'
generate with its dynamic cache (the static one is no faster here, and vLLM needs a GPU).
"""

import logging
import os
import tempfile
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import torch
import transformers
import tyro

import common
import harness.policy
import harness.run
import pass_at_k_pg
from verifiers import load_task

SOLVE_RATES = (0.71, 0.33, 0.13, 0.05, 0.002)  # of the warm-started tiny policy, levels 1 to 5 of `arithmetic`
BARS = {("a", "GRPO"): 1 / 3, ("b", "GRPO"): 0.7}
MODEL_BARS = {("a", "GRPO"): 1 / 2, ("b", "GRPO"): 0.8}


@dataclass
class Args:
    model: str | None = None
    """folder of a model to train on `sums`, in place of a small random one on `arithmetic`"""
    steps: int = 15
    """steps of each system that are timed, in each of the four pairings, after two that are not"""
    prompts: int = 16
    """prompts a step"""
    n: int = 8
    """samples a prompt"""
    k: int = 4
    """of pass@k in case (a)"""
    tokens: int = 16
    """length of every response"""
    threads: int = 1
    """CPU threads"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    json: str | None = None
    """write the numbers to this file, too"""


def draw_rewards(case: str, prompts: int, n: int, step: int) -> torch.Tensor:
    """(prompts, n) rewards of this step, a function of its number alone."""
    uniform = torch.rand(prompts, n, generator=torch.Generator().manual_seed(step))
    rates = torch.tensor([SOLVE_RATES[b % len(SOLVE_RATES)] for b in range(prompts)]).unsqueeze(-1)
    return (uniform < rates).float() if case == "a" else uniform


class OurStep:
    """The step of pass_at_k_pg.py on one policy; `parts` keeps the seconds of its parts, a dict a step."""

    def __init__(self, policy, task, problems, n, k, tokens, case):
        self.policy, self.task, self.problems, self.case = policy, task, problems, case
        self.n, self.k, self.tokens = n, k, tokens
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.parts = []

    def __call__(self, step: int) -> None:
        generator = harness.run.seeded_generator(self.policy.device, "step", step)

        def sample():
            prompts = harness.policy.encode_prompts(self.policy, self.task, self.problems, self.tokens)
            self.rollouts = common.sample(self.policy, prompts, self.n, self.tokens, 1.0, generator)

        def verify():
            self.task.verify(self.problems, common.decode(self.policy, self.rollouts))
            rewards = draw_rewards(self.case, len(self.problems), self.n, step)
            estimator, k = ("unbiased", self.k) if self.case == "a" else ("mean", 1)
            self.advantages = pass_at_k_pg.advantages(rewards, k, estimator)

        def train():
            self.stats = common.policy_gradient_step(self.policy, self.optimizer, self.rollouts, self.advantages)

        part = {"sample": measure.seconds(sample), "verify": measure.seconds(verify), "train": measure.seconds(train)}
        part["total"] = sum(part.values())
        self.parts.append(part | {"signal": self.stats["nonzero_advantage"], "tokens": int(self.rollouts.mask.sum())})


def pair(name: str, case: str, args: Args) -> tuple[list[float], list[dict]]:
    """Run TRL's trainer and, after each of its steps, one of ours: its seconds a step, and the parts of ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    task = load_task("sums" if args.model else "arithmetic")
    problems = task.train[:: len(task.train) // args.prompts][: args.prompts]

    def policy() -> common.Policy:
        if args.model:
            return measure.endless(harness.policy.load_policy(args.model, task, args.device))
        return measure.tiny_policy(args.device)

    def prompt(problem) -> str | list[dict]:
        if peer.tokenizer.chat_template:
            return [{"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}".strip()}]
        return task.template.replace("{prompt}", problem.prompt)

    ours = OurStep(policy(), task, problems, args.n, args.k, args.tokens, case)
    peer, warm_up, times = policy(), 2, []

    def reward(completions, completion_ids, **_):
        completions = [c if isinstance(c, str) else c[0]["content"] for c in completions]  # a chat's turn, or text
        rows = [completions[i : i + args.n] for i in range(0, len(completions), args.n)]
        if len(rows) != args.prompts or {len(ids) for ids in completion_ids} != {args.tokens}:
            raise RuntimeError("the peer did not sample what this benchmark is about")
        task.verify(problems, rows)
        return draw_rewards(case, args.prompts, args.n, len(times)).flatten().tolist()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = measure.now()

        def on_step_end(self, *_, **__):
            elapsed = measure.now() - self.start
            ours(len(times))
            times.append(elapsed)

    shared = dict(
        max_steps=warm_up + args.steps, per_device_train_batch_size=args.prompts * args.n, num_generations=args.n,
        max_completion_length=args.tokens, learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0,
        beta=0.0, bf16=False, gradient_checkpointing=False, use_cpu=args.device == "cpu",
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        shuffle_dataset=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        if name == "GRPO":
            config = GRPOConfig(scratch, loss_type="dr_grpo", scale_rewards="none", **shared)
            trainer = GRPOTrainer
        else:
            config, trainer = RLOOConfig(scratch, **shared), RLOOTrainer
        trainer = trainer(
            model=peer.model, reward_funcs=reward, args=config, processing_class=peer.tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt(p)} for p in problems]), callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return times[warm_up:], ours.parts[warm_up:]


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads, "trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    model = args.model or "Llama hidden 192, 4 layers"
    print(
        f"{args.prompts} prompts x {args.n} samples x {args.tokens} tokens, {model}, on "
        f"{args.device}, float32; {args.steps} steps of each, in turn; median [quartiles]\n"
    )
    rows, shares, results = [], [], []
    for case in "ab":
        for name in ("GRPO", "RLOO"):
            times, parts = pair(name, case, args)
            ratios = [part["total"] / time for part, time in zip(parts, times)]
            bar = (MODEL_BARS if args.model else BARS).get((case, name))
            rows.append([
                f"({case}) {name}Trainer", f"{sum(p['signal'] for p in parts) / len(parts):.0%}",
                measure.spread([part["total"] for part in parts]), measure.spread(times), measure.spread(ratios),
                "" if bar is None else measure.verdict(measure.quartiles(ratios)[0], bar, at_most=True),
            ])  # fmt: skip
            middle = {key: measure.quartiles([part[key] for part in parts])[0] for key in parts[0]}
            cells = [
                f"{middle[key]:.3f} ({middle[key] / middle['total']:.0%})" for key in ("sample", "verify", "train")
            ]
            shares.append([f"({case}), beside {name}Trainer", *cells, f"{middle['total']:.3f}"])
            results.append({"case": case, "peer": name, "peer_seconds": times, "ours": parts, "ratios": ratios})
    measure.print_table(["case, peer", "rows with signal", "ours, s", "peer, s", "ours / peer", ""], rows)
    measure.print_table(
        ["parts of ours, s", "sample", "verify, advantages", "forward, backward, AdamW", "total"], shares
    )
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
