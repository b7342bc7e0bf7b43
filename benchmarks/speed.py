"""Speed and memory of this code beside named peers, and where the time of a step goes: the tables of docs/speed.md.

    python benchmarks/speed.py --data FOLDER                              # all of them; --publish: into docs/speed.md
    python benchmarks/speed.py --part sample --models runs/smollm2        # one of them, on one model

step     a whole training step (sample, decode, verify, advantages, forward, backward, AdamW) beside one of TRL's
         GRPOTrainer, without a KL. The reward is a seeded draw, whatever the text says: `few`, 0/1 with the solve rates
         of `arithmetic`, where pass@4 gives many rows no advantage and ours leaves them out; `every`, uniform in [0, 1)
         with the estimator `mean`. TRL is set to be fast: float32, one pass, no checkpointing or logging, fused AdamW.
sample   tokens/s of common.sample beside model.generate on the same weights and prompts. Ours also returns log-probs.
memory   the peak of common.accumulate_gradient above the memory in use before, beside the step that holds all logits.
sandbox  HumanEval's reference solutions a second, isolated (ten times over in a round), beside plain processes.
time     shares of the parts of a step of `pass_at_k_pg.py --k 4`, with its real rewards; of `tiny` on `suspects`.

The model `tiny` is a Llama of random weights on `arithmetic` (192 wide, 4 layers; for memory 128 wide, 2 layers and
152k tokens). A folder is a pretrained model on `sums`, see pretrained.py. Systems take turns in one run; ratios are
medians [quartiles] of the pairs of a round.
"""

import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from verifiers import BadInput, Problem, Task, load_task

Part = Literal["step", "sample", "memory", "sandbox", "time"]
SOLVE_RATES = (0.71, 0.33, 0.13, 0.05, 0.002)  # of the warm-started tiny policy, levels 1 to 5 of `arithmetic`


@dataclass
class Args:
    part: tuple[Part, ...] = get_args(Part)  # what is measured
    models: tuple[str, ...] = ("tiny",)  # tiny, folders of models
    rounds: int = 9  # how often each system is measured, after one that is not counted; a third as often for a folder
    prompts: int | None = None  # prompts of a batch, 8 samples each (default: 16; 8 for a folder; 4 for memory)
    tokens: int | None = None  # longest response (default: 16 in a step, 64 in sampling and memory; 12 for a folder)
    vocabulary: int = 151_936  # tokens of the small model of `memory`
    data: str | None = None  # folder with HumanEval's rows
    threads: int = 1  # CPU threads
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    publish: bool = False  # put the tables into docs/speed.md


HEADS = {
    "step": ["model", "rows with a signal", "ours, s", "TRL's GRPOTrainer, s", "ours / TRL", "bar"],
    "sample": ["model, responses", "mean length: ours, peer", "ours, tokens/s", "`generate`", "ours / generate", "bar"],
    "memory": ["model", "rows x tokens", "vocabulary", "ours, MiB", "all logits, MiB", "ours / all logits", "bar"],
    "sandbox": ["programs", "isolated, programs/s", "plain processes, programs/s", "isolated / plain", "bar"],
    "time": ["model", "sample", "decode", "verify", "advantages, forward, backward, AdamW", "whole, s"],
}  # fmt: skip


def compared(ours: list[float], peers: list[float], bar: float, less: bool = True) -> list[str]:
    """The cells for both systems, their ratio in each round, and the bar. less: whether the ratio shall be less."""
    ratios = [a / b for a, b in zip(ours, peers)]
    met = np.median(ratios) <= bar if less else np.median(ratios) >= bar
    cells = [measure.spread(values) for values in (ours, peers, ratios)]
    return [*cells, f"{'≤' if less else '≥'} {bar:.3g}, {'met' if met else '**missed**'}"]


def setting(args: Args, model: str, task: Task, tokens: int) -> tuple[Sequence[Problem], int, int]:
    """Problems of a batch, evenly spread, longest response, and rounds for a model. tokens: of `tiny`."""
    count, longest, rounds = (16, tokens, args.rounds) if model == "tiny" else (8, 12, -(-args.rounds // 3))
    count = args.prompts or count
    return task.train[:: len(task.train) // count][:count], args.tokens or longest, rounds


def policy_and_task(model: str, device: str, full: bool) -> tuple[common.Policy, Task]:
    """full: no response ends early. Else of 99 characters 5 end one, and a real model decides itself."""
    if model == "tiny":
        return measure.tiny_policy(device, stop=0 if full else 5), load_task("arithmetic")
    task = load_task("sums")
    policy = load_policy(model, task, device)
    return measure.endless(policy) if full else policy, task


def draw_rewards(case: str, prompts: int, n: int, step: int) -> torch.Tensor:
    """(prompts, n) rewards of this step, a function of its number alone."""
    uniform = torch.rand(prompts, n, generator=torch.Generator().manual_seed(step))
    rates = torch.tensor([SOLVE_RATES[b % len(SOLVE_RATES)] for b in range(prompts)]).unsqueeze(-1)
    return (uniform < rates).float() if case == "few" else uniform


def our_steps(policy: common.Policy, task: Task, problems, n: int, tokens: int, case: str | None) -> Iterator[dict]:
    """Steps of pass_at_k_pg.py, without end: the seconds of a step's parts and of the whole, and the share of rows with
    a signal. case: see `draw_rewards`, or None for the task's own rewards."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    for step in itertools.count():
        generator = harness.run.seeded_generator(policy.device, "step", step)
        times = [measure.now()]
        prompts = encode_prompts(policy, task, problems, tokens)
        rollouts = common.sample(policy, prompts, n, tokens, 1.0, generator)
        times.append(measure.now())
        responses = common.decode(policy, rollouts)
        times.append(measure.now())
        rewards = task.verify(problems, responses).rewards
        times.append(measure.now())
        rewards = draw_rewards(case, len(problems), n, step) if case else rewards
        A = advantages(rewards, *((1, "mean") if case == "every" else (4, "unbiased")))
        stats = common.policy_gradient_step(policy, optimizer, rollouts, A)
        times.append(measure.now())
        part = dict(zip(("sample", "decode", "verify", "train"), np.diff(times)))
        yield part | {"whole": times[-1] - times[0], "signal": stats["nonzero_advantage"]}


def step_rows(args: Args, model: str) -> list[list[str]]:
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
    (mine, task), (peer, _) = (policy_and_task(model, args.device, True) for _ in range(2))
    (problems, tokens, rounds), n, times, parts = setting(args, model, task, 16), 8, [], []
    ours, count = our_steps(mine, task, problems, n, tokens, case), len(problems)

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
            parts.append(next(ours))

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
    return times[2:], parts[2:]


def time_rows(args: Args, model: str) -> list[list[str]]:
    task = load_task("suspects" if model == "tiny" else "sums")
    (problems, tokens, rounds), n = setting(args, model, task, task.max_new_tokens), 16 if model == "tiny" else 8
    steps = our_steps(load_policy(model, task, args.device), task, problems, n, tokens, None)
    _, *parts = itertools.islice(steps, 1 + rounds)
    middle = {name: np.median([part[name] for part in parts]) for name in parts[0]}
    shares = [f"{middle[name] / middle['whole']:.0%}" for name in ("sample", "decode", "verify", "train")]
    return [[model, *shares, measure.spread([part["whole"] for part in parts])]]


@torch.no_grad()
def generate(policy: common.Policy, prompts: list[list[int]], n: int, tokens: int) -> torch.Tensor:
    """Lengths (B n,) of responses that `generate` samples, the end included."""
    ids, mask = (x.to(policy.device) for x in common.padded(prompts, left=True))
    with common.autocast(policy.device):
        output = policy.model.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, num_return_sequences=n,
            max_new_tokens=tokens, eos_token_id=policy.stop_ids, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
    ended = torch.isin(output, torch.tensor(policy.stop_ids, device=output.device))
    before = ended.int().cumsum(-1) - ended.int() == 0  # no end among the earlier tokens
    return before.sum(-1)


def sample_rows(args: Args, model: str) -> list[list[str]]:
    bar, n, rows = 1.5 if model == "tiny" else 1.0, 8, []
    for full in (True, False):
        policy, task = policy_and_task(model, args.device, full)
        problems, tokens, rounds = setting(args, model, task, 64)
        prompts = encode_prompts(policy, task, problems, tokens)
        ours = partial(common.sample, policy, prompts, n, tokens)
        # Seconds and lengths: (B, n) of ours, (B n,) of the peer's.
        found = measure.interleaved([lambda: ours().mask.sum(-1), lambda: generate(policy, prompts, n, tokens)], rounds)
        rates = [[lengths.sum().item() / s for s, lengths in rows] for rows in found]
        means = ", ".join(f"{np.mean([lengths.double().mean().item() for _, lengths in rows]):.1f}" for rows in found)
        what = f"{model}, {'full length' if full else 'varying length'}"
        rows.append([what, means, *compared(*rates, bar, less=False)])
    return rows


def all_logits(policy: common.Policy, rollouts: common.Rollouts, A: torch.Tensor) -> None:
    """The gradient by log_softmax of all logits, all rows in one pass."""
    B, n, T = rollouts.ids.shape
    prompts = torch.tensor(rollouts.prompts, device=policy.device).repeat_interleave(n, 0)  # (B n, P)
    ids = rollouts.ids.flatten(0, 1)  # (B n, T)
    log_p = policy.model(torch.cat([prompts, ids], 1)).logits[:, -T - 1 : -1].log_softmax(-1)  # (B n, T, V)
    log_p = log_p.gather(-1, ids.unsqueeze(-1))[..., 0].sum(-1).view(B, n)  # (B n, T, 1) -> (B, n)
    (-(A.to(policy.device) * log_p).sum() / B).backward()


STEPS = {"ours": common.accumulate_gradient, "all logits": all_logits}


def resident(field: str) -> int:
    """Bytes of this process, from /proc: VmRSS, resident now, or VmHWM, the most since `clear_refs` was written to.
    ru_maxrss is no use: a process starts with the one of its parent."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak(name: str, args: Args, model: str) -> tuple[float, int]:
    """In a child process: MiB that one step on random tokens, 8 samples to each prompt of 16 tokens, needs at its peak
    beyond weights and gradients; and the size of the vocabulary."""
    torch.set_num_threads(args.threads)
    B, T, generator = args.prompts or 4, args.tokens or 64, torch.Generator().manual_seed(0)
    if model == "tiny":
        policy = measure.tiny_policy(args.device, hidden=128, layers=2, vocabulary=args.vocabulary)
    else:
        policy = load_policy(model, load_task("suspects"), args.device)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (B, 8, T), generator=generator).to(args.device)
    prompts = torch.randint(vocabulary, (B, 16), generator=generator).tolist()
    rollouts = common.Rollouts(prompts, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))
    A = torch.randn(B, 8, generator=generator)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)  # zeros alone take no memory before they are written to
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        STEPS[name](policy, rollouts, A)
        most = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        STEPS[name](policy, rollouts, A)
        most = resident("VmHWM")
    return (most - before) / 2**20, vocabulary


def memory_rows(args: Args, model: str) -> list[list[str]]:
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        raise BadInput("resident memory is read from /proc: --part memory runs on Linux, or with --device cuda")
    measured = {name: [] for name in STEPS}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as child:
        for name in [*STEPS] * -(-args.rounds // 3):
            try:
                most, vocabulary = child.submit(peak, name, args, model).result()
            except RuntimeError as error:  # of torch, or that the child was killed
                raise BadInput(f"{name!r}: {error}: out of memory? Try fewer --prompts") from error
            measured[name].append(most)
    rows = f"{8 * (args.prompts or 4)} x (16 + {args.tokens or 64})"
    return [[model, rows, str(vocabulary), *compared(*measured.values(), 1 / 4)]]


def sandbox_rows(args: Args) -> list[list[str]]:
    """All programs in the sandbox, ten times over, and once in plain processes."""
    from verifiers.code_tasks import program_of
    from verifiers.sandbox.pool import Sandbox

    programs = [program_of(problem, problem.solution) for problem in load_task("humaneval", args.data).test]
    plain = [[sys.executable, "-c", f"{program.source}\n{program.tests}"] for program in programs]
    with Sandbox() as sandbox, ThreadPoolExecutor(sandbox.count) as threads:
        run = partial(subprocess.run, capture_output=True)
        isolated, unprotected = measure.interleaved(
            [lambda: [result.passed for result in sandbox.run(programs * 10)],
             lambda: [process.returncode == 0 for process in threads.map(run, plain)]], args.rounds
        )  # fmt: skip
    assert all(all(passed) for _, passed in (*isolated, *unprotected)), "a solution fails"
    rates = [[len(passed) / s for s, passed in rows] for rows in (isolated, unprotected)]
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
