"""Speed and memory of this code beside named peers, and where the time of a step goes: the tables of docs/speed.md.

    python benchmarks/speed.py --data FOLDER                              # all of them; --publish: into docs/speed.md
    python benchmarks/speed.py --part sample --models runs/smollm2        # one of them, on one model

step     a whole training step (sample, decode, verify, advantages, forward, backward, AdamW) beside one of TRL's
         GRPOTrainer, without a KL on either side. The reward is a seeded draw, whatever the text says: `few`, 0/1 with
         the solve rates of `arithmetic`, where ours leaves out the rows that pass@4 gives no advantage; `every`,
         uniform in [0, 1) with the estimator `mean`, where every row has a signal. TRL is set to be fast: float32, one
         pass for all rows, no checkpointing, no logging, its fused AdamW. Left out where trl is not installed.
sample   tokens/s of common.sample beside model.generate on the same weights and prompts. Ours also returns log-probs.
memory   the peak of common.accumulate_gradient above the memory in use before, beside the step that holds all logits.
sandbox  HumanEval's reference solutions a second, isolated, beside plain processes; --data has its rows.
time     shares of the parts of a step of `pass_at_k_pg.py --k 4`, with its real rewards; of `tiny` on `suspects`.

The model `tiny` is a Llama of random weights on `arithmetic` (192 wide, 4 layers; for memory 128 wide, 2 layers and
152k tokens). A folder is a pretrained model on `sums`, see pretrained.py. Systems take turns in one run; ratios are
medians [quartiles] of the pairs of a round.
"""

import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import measure  # first: puts the repository on the path
import numpy as np
import torch
import transformers

import common
import harness.run
from harness.policy import encode_prompts, load_policy
from pass_at_k_pg import advantages
from verifiers import BadInput, Task, load_task

Part = Literal["step", "sample", "memory", "sandbox", "time"]
SOLVE_RATES = (0.71, 0.33, 0.13, 0.05, 0.002)  # of the warm-started tiny policy, levels 1 to 5 of `arithmetic`


@dataclass
class Args:
    part: tuple[Part, ...] = get_args(Part)  # what is measured
    models: tuple[str, ...] = ("tiny",)  # tiny, folders of models
    rounds: int = 9  # how often each system is measured, after one that is not counted; a third as often for a folder
    prompts: int | None = None  # prompts of a batch, 8 samples each (default: 16; 8 for a folder; 64 for tiny on CUDA)
    tokens: int | None = None  # longest response (default: 16 in a step, 64 in sampling; 12 for a folder; 256 on CUDA)
    vocabulary: int = 151_936  # tokens of the small model of `memory`
    data: str | None = None  # folder with HumanEval's rows
    threads: int = 1  # CPU threads
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    publish: bool = False  # put the tables into docs/speed.md


Row = list[str]
HEADS = {
    "step": ["model", "rows with a signal", "ours, s", "TRL's GRPOTrainer, s", "ours / TRL", "bar"],
    "sample": ["model, responses", "mean length: ours, peer", "ours, tokens/s", "`generate`", "ours / generate", "bar"],
    "memory": ["model", "rows x tokens", "vocabulary", "ours, MiB", "all logits, MiB", "ours / all logits", "bar"],
    "sandbox": ["programs", "isolated, programs/s", "plain processes, programs/s", "isolated / plain", "bar"],
    "time": ["model", "sample", "decode", "verify", "advantages, forward, backward, AdamW", "whole, s"],
}  # fmt: skip


def compared(ours: list[float], peers: list[float], bar: float | None, less: bool = True) -> Row:
    """The cells for both systems, their ratio in each round, and the bar. less: whether the ratio shall be less."""
    ratios = [a / b for a, b in zip(ours, peers)]
    met = "" if bar is None else "met" if (np.median(ratios) <= bar) == less else "**missed**"
    cells = [measure.spread(values) for values in (ours, peers, ratios)]
    return [*cells, "" if bar is None else f"{'≤' if less else '≥'} {bar:.3g}, {met}"]


def size(args: Args, model: str, tokens: int) -> tuple[int, int, int]:
    """Prompts, tokens and rounds for a model."""
    if model != "tiny":
        return args.prompts or 8, args.tokens or 12, -(-args.rounds // 3)
    usual = (64, 256) if args.device == "cuda" else (16, tokens)
    return args.prompts or usual[0], args.tokens or usual[1], args.rounds


def policy_and_task(model: str, device: str, full: bool) -> tuple[common.Policy, Task]:
    """full: no response ends early. Else of 99 characters 5 end one, and a real model decides itself."""
    if model == "tiny":
        return measure.tiny_policy(device, stop=0 if full else 5), load_task("arithmetic")
    task = load_task("sums")
    policy = load_policy(model, task, device)
    return measure.endless(policy) if full else policy, task


# --- a step -----------------------------------------------------------------------------------------------------------


def draw_rewards(case: str, prompts: int, n: int, step: int) -> torch.Tensor:
    """(prompts, n) rewards of this step, a function of its number alone."""
    uniform = torch.rand(prompts, n, generator=torch.Generator().manual_seed(step))
    rates = torch.tensor([SOLVE_RATES[b % len(SOLVE_RATES)] for b in range(prompts)]).unsqueeze(-1)
    return (uniform < rates).float() if case == "few" else uniform


class OurStep:
    """The step of pass_at_k_pg.py. `parts` keeps the seconds of its parts, a dict a step. case: see `draw_rewards`, or
    None for the task's own rewards."""

    def __init__(self, policy, task, problems, n: int, tokens: int, case: str | None):
        self.policy, self.task, self.problems, self.n, self.tokens, self.case = policy, task, problems, n, tokens, case
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.parts = []

    def __call__(self) -> None:
        step, B = len(self.parts), len(self.problems)
        generator = harness.run.seeded_generator(self.policy.device, "step", step)
        times = [measure.now()]
        prompts = encode_prompts(self.policy, self.task, self.problems, self.tokens)
        rollouts = common.sample(self.policy, prompts, self.n, self.tokens, 1.0, generator)
        times.append(measure.now())
        responses = common.decode(self.policy, rollouts)
        times.append(measure.now())
        rewards = self.task.verify(self.problems, responses).rewards
        times.append(measure.now())
        rewards = draw_rewards(self.case, B, self.n, step) if self.case else rewards
        A = advantages(rewards, *((1, "mean") if self.case == "every" else (4, "unbiased")))
        stats = common.policy_gradient_step(self.policy, self.optimizer, rollouts, A)
        times.append(measure.now())
        names = ("sample", "decode", "verify", "train")
        part = {name: after - before for name, before, after in zip(names, times, times[1:])}
        self.parts.append(part | {"whole": times[-1] - times[0], "signal": stats["nonzero_advantage"]})


def step_rows(args: Args, model: str) -> list[Row]:
    bars = {"few": 1 / 3, "every": 0.7} if model == "tiny" else {"few": 0.5, "every": 0.8}
    rows = []
    for case in ("few", "every"):
        theirs, parts = beside_trl(args, model, case)
        signal = sum(part["signal"] for part in parts) / len(parts)
        rows.append([model, f"{signal:.0%}", *compared([part["whole"] for part in parts], theirs, bars[case])])
    return rows


def beside_trl(args: Args, model: str, case: str) -> tuple[list[float], list[dict]]:
    """Run TRL's trainer and one of our steps after each of its own: its seconds a step, and the parts of ours."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    (count, tokens, rounds), n, times = size(args, model, 16), 8, []
    (mine, task), (peer, _) = (policy_and_task(model, args.device, True) for _ in range(2))
    problems = task.train[:: len(task.train) // count][:count]
    ours = OurStep(mine, task, problems, n, tokens, case)

    def prompt(problem) -> str | list[dict]:
        if peer.tokenizer.chat_template:
            return [{"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}".strip()}]
        return task.template.replace("{prompt}", problem.prompt)

    def reward(completions, completion_ids, **_):
        completions = [c if isinstance(c, str) else c[0]["content"] for c in completions]  # a chat's turn, or text
        if len(completions) != count * n or {len(ids) for ids in completion_ids} != {tokens}:
            raise RuntimeError("the peer did not sample what this benchmark is about")
        task.verify(problems, [completions[i : i + n] for i in range(0, count * n, n)])
        return draw_rewards(case, count, n, len(times)).flatten().tolist()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = measure.now()

        def on_step_end(self, *_, **__):
            times.append(measure.now() - self.start)
            ours()

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            scratch, loss_type="dr_grpo", scale_rewards="none", beta=0.0, max_steps=2 + rounds, num_generations=n,
            per_device_train_batch_size=count * n, max_completion_length=tokens, learning_rate=1e-4, max_grad_norm=1.0,
            lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, use_cpu=args.device == "cpu",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, shuffle_dataset=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt(p)} for p in problems])
        trainer = GRPOTrainer(peer.model, reward, config, data, processing_class=peer.tokenizer, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return times[2:], ours.parts[2:]


def time_rows(args: Args, model: str) -> list[Row]:
    task = load_task("suspects" if model == "tiny" else "sums")
    (count, tokens, rounds), n = size(args, model, task.max_new_tokens), 16 if model == "tiny" else 8
    problems = task.train[:: len(task.train) // count][:count]
    ours = OurStep(load_policy(model, task, args.device), task, problems, n, tokens, None)
    for _ in range(1 + rounds):
        ours()
    middle = {name: np.median([part[name] for part in ours.parts[1:]]) for name in ours.parts[0]}
    shares = [f"{middle[name] / middle['whole']:.0%}" for name in ("sample", "decode", "verify", "train")]
    return [[model, *shares, measure.spread([part["whole"] for part in ours.parts[1:]])]]


# --- sampling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(policy: common.Policy, prompts: list[list[int]], n: int, tokens: int) -> list[int]:
    """Lengths of responses that `generate` samples, the end included."""
    ids, mask = (x.to(policy.device) for x in common.padded(prompts, left=True))
    with common.autocast(policy.device):
        output = policy.model.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, num_return_sequences=n,
            max_new_tokens=tokens, eos_token_id=policy.stop_ids, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
    ended = torch.isin(output, torch.tensor(policy.stop_ids, device=output.device))
    before = ended.int().cumsum(-1) - ended.int() == 0  # no end among the earlier tokens
    return before.sum(-1).tolist()


def sample_rows(args: Args, model: str) -> list[Row]:
    bar, (count, tokens, rounds), n, rows = 1.5 if model == "tiny" else 1.0, size(args, model, 64), 8, []
    for full in (True, False):
        policy, task = policy_and_task(model, args.device, full)
        prompts = encode_prompts(policy, task, task.train[:: len(task.train) // count][:count], tokens)
        lengths = {"ours": [], "generate": []}

        def ours():
            mask = common.sample(policy, prompts, n, tokens).mask  # (B, n, T)
            lengths["ours"].append(mask.sum(-1).flatten().tolist())

        def theirs():
            lengths["generate"].append(generate(policy, prompts, n, tokens))

        times = measure.interleaved({"ours": ours, "generate": theirs}, rounds)
        rates = [[sum(x) / s for x, s in zip(lengths[key][1:], times[key])] for key in lengths]
        means = ", ".join(f"{sum(map(sum, x)) / sum(map(len, x)):.1f}" for x in lengths.values())
        what = f"{model}, {'full length' if full else 'varying length'}"
        rows.append([what, means, *compared(*rates, bar, less=False)])
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def batch(args: Args, model: str, prompts: int) -> tuple[common.Policy, common.Rollouts, torch.Tensor]:
    """The model, random tokens, 8 samples to each prompt, and random advantages (prompts, 8)."""
    policy = measure.tiny_policy(args.device, hidden=128, layers=2, vocabulary=args.vocabulary)
    if model != "tiny":
        policy = load_policy(model, load_task("suspects"), args.device)
    generator, vocabulary = torch.Generator().manual_seed(0), policy.model.config.vocab_size
    ids = torch.randint(vocabulary, (prompts, 8, args.tokens or 64), generator=generator).to(args.device)
    prompt_ids = torch.randint(vocabulary, (prompts, 16), generator=generator).tolist()
    rollouts = common.Rollouts(prompt_ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))
    return policy, rollouts, torch.randn(prompts, 8, generator=generator)


def all_logits(policy: common.Policy, rollouts: common.Rollouts, A: torch.Tensor) -> None:
    """The gradient by log_softmax of all logits, all rows in one pass."""
    B, n, T = rollouts.ids.shape
    prompts = torch.tensor(rollouts.prompts, device=policy.device).repeat_interleave(n, 0)  # (B n, P)
    ids = rollouts.ids.flatten(0, 1)  # (B n, T)
    log_p = policy.model(torch.cat([prompts, ids], 1)).logits[:, -T - 1 : -1].log_softmax(-1)  # (B n, T, V)
    log_p = log_p.gather(-1, ids.unsqueeze(-1))[..., 0].sum(-1).view(B, n)  # (B n, T, 1) -> (B, n)
    (-(A.to(policy.device) * log_p).sum() / B).backward()


STEPS = {"ours": common.accumulate_gradient, "all logits": all_logits}


def status(field: str) -> int:
    """Bytes of this process, from /proc: VmRSS, resident now, or VmHWM, the most since `clear_refs` was written to.
    ru_maxrss is no use: a process starts with the one of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(name: str, args: Args, model: str, results: multiprocessing.SimpleQueue) -> None:
    """In a child process: bytes that one step needs at its peak beyond weights and gradients."""
    torch.set_num_threads(args.threads)
    policy, rollouts, A = batch(args, model, args.prompts or 4)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)  # zeros alone take no memory before they are written to
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        STEPS[name](policy, rollouts, A)
        results.put(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        STEPS[name](policy, rollouts, A)
        results.put(status("VmHWM") - before)


def memory_rows(args: Args, model: str) -> list[Row]:
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        raise BadInput("resident memory is read from /proc: --part memory runs on Linux, or with --device cuda")
    context, measured = multiprocessing.get_context("spawn"), {name: [] for name in STEPS}
    for _ in range(-(-args.rounds // 3)):
        for name in STEPS:
            results = context.SimpleQueue()
            child = context.Process(target=peak, args=(name, args, model, results))
            child.start()
            child.join()
            if child.exitcode:
                raise BadInput(f"{name!r} ended with {child.exitcode}: out of memory? Try fewer --prompts")
            measured[name].append(results.get() / 2**20)
    vocabulary = batch(args, model, 1)[0].model.config.vocab_size
    rows = f"{8 * (args.prompts or 4)} x (16 + {args.tokens or 64})"
    return [[model, rows, str(vocabulary), *compared(*measured.values(), 1 / 4)]]


# --- the sandbox ------------------------------------------------------------------------------------------------------


def sandbox_rows(args: Args) -> list[Row]:
    """All programs in the sandbox, ten times over in a round, and once in plain processes."""
    from verifiers.code_tasks import program_of
    from verifiers.sandbox.pool import Sandbox

    problems, times = load_task("humaneval", args.data).test, min(10, args.rounds)
    programs = [program_of(problem, problem.solution) for problem in problems]
    plain = [[sys.executable, "-c", f"{program.source}\n{program.tests}"] for program in programs]
    with Sandbox() as sandbox, ThreadPoolExecutor(sandbox.count) as threads:

        def isolated() -> None:
            assert all(result.passed for result in sandbox.run(programs * times)), "isolated: a solution fails"

        def unprotected() -> None:
            runs = threads.map(lambda command: subprocess.run(command, capture_output=True).returncode, plain)
            assert not any(runs), "plain: a solution fails"

        found = measure.interleaved({"isolated": isolated, "plain": unprotected}, args.rounds)
    rates = [times * len(plain) / t for t in found["isolated"]], [len(plain) / t for t in found["plain"]]
    what = f"{len(plain)} solutions, {sandbox.count} at once, level {sandbox.level}"
    return [[what, *compared(*rates, 3.9, less=False)]]


ROWS = {"step": step_rows, "sample": sample_rows, "memory": memory_rows, "time": time_rows}


def main(args: Args) -> None:
    missing = {"step": not importlib.util.find_spec("trl") and "trl is not installed, see benchmarks/requirements.txt",
               "sandbox": not args.data and "give --data, a folder with HumanEval's rows"}  # fmt: skip
    peers = [] if missing["step"] else ["trl"]
    head, tables = measure.in_words(measure.machine(args.threads, *peers)), {}
    print(head + "\n")
    for part in args.part:
        if missing.get(part):
            print(f"{part}: not measured: {missing[part]}\n")
            continue
        rows = sandbox_rows(args) if part == "sandbox" else [row for m in args.models for row in ROWS[part](args, m)]
        tables[f"speed-{part}"] = measure.markdown(HEADS[part], rows)
        print(tables[f"speed-{part}"] + "\n")
    if args.publish:
        measure.publish(tables | {"speed-machine": head})


if __name__ == "__main__":
    measure.program(main, Args)
