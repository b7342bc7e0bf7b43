"""Peak memory of the training pass at a vocabulary of 152k, beside the naive step that holds all logits.

    python benchmarks/memory.py
    python benchmarks/memory.py --model runs/gemma3 --rounds 1    # a real model of 262k tokens, see smollm2.py

The naive step is `log_softmax(model(ids).logits)`, gathered at the sampled tokens, all rows in one pass; ours is
common.accumulate_gradient. Without --model a small one (hidden 128, 2 layers), so that the logits dominate. First both
gradients are compared, on fewer rows; then each step runs in a fresh process: its peak resident memory (on CUDA:
allocated memory) during the step, less the memory in use just before, which holds the weights and their zeroed
gradients.
"""

import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import measure  # first: puts the repository on the path
import torch
import tyro

import common
from harness.policy import load_policy
from verifiers import load_task

BAR = 1 / 4


@dataclass
class Args:
    prompts: int = 4
    """prompts"""
    n: int = 8
    """samples a prompt"""
    tokens: int = 64
    """length of every response"""
    prompt_tokens: int = 16
    """length of every prompt"""
    model: str | None = None
    """folder of a model, with its own vocabulary"""
    vocabulary: int = 151_936
    """tokens in the vocabulary of the small one (Qwen2)"""
    rounds: int = 2
    """fresh processes for each, in turn"""
    threads: int = 1
    """CPU threads"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    json: str | None = None
    """write the numbers to this file, too"""


def make(args: Args, prompts: int) -> tuple[common.Policy, common.Rollouts, torch.Tensor]:
    """The model, or a small one of random weights; random tokens, random advantages (prompts, n)."""
    if args.model:
        policy = load_policy(args.model, load_task("suspects"), args.device)
    else:
        policy = measure.tiny_policy(args.device, hidden=128, layers=2, vocabulary=args.vocabulary)
    generator, vocabulary = torch.Generator().manual_seed(0), policy.model.config.vocab_size
    shape = (prompts, args.n, args.tokens)
    ids = torch.randint(vocabulary, shape, generator=generator).to(args.device)
    prompt_ids = torch.randint(vocabulary, (prompts, args.prompt_tokens), generator=generator).tolist()
    rollouts = common.Rollouts(
        prompt_ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(shape, device=args.device)
    )
    return policy, rollouts, torch.randn(prompts, args.n, generator=generator)


def ours(policy: common.Policy, rollouts: common.Rollouts, advantages: torch.Tensor) -> None:
    common.accumulate_gradient(policy, rollouts, advantages)


def naive(policy: common.Policy, rollouts: common.Rollouts, advantages: torch.Tensor) -> None:
    B, n, T = rollouts.ids.shape
    prompts = torch.tensor(rollouts.prompts, device=policy.device).repeat_interleave(n, 0)  # (B*n, P)
    ids = rollouts.ids.flatten(0, 1)  # (B*n, T)
    log_p = policy.model(torch.cat([prompts, ids], 1)).logits[:, -T - 1 : -1].log_softmax(-1)  # (B*n, T, V)
    log_p = log_p.gather(-1, ids.unsqueeze(-1))[..., 0].sum(-1).view(B, n)
    (-(advantages.to(policy.device) * log_p).sum() / B).backward()


STEPS = {"ours": ours, "naive": naive}


def gradient(name: str, args: Args) -> torch.Tensor:
    """The whole gradient as one vector, of one prompt's samples."""
    policy, rollouts, advantages = make(args, prompts=1)
    STEPS[name](policy, rollouts, advantages)
    return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])


def status(field: str) -> int:
    """Bytes of this process, from /proc: VmRSS, resident now, or VmHWM, the most since `clear_refs` was written to.

    Not getrusage's ru_maxrss: a process starts with that of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(name: str, args: Args, results: multiprocessing.SimpleQueue) -> None:
    """In a child process: bytes that one step needs at its peak beyond those in use before."""
    torch.set_num_threads(args.threads)
    policy, rollouts, advantages = make(args, args.prompts)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)  # zeros alone take no memory before they are written to
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        STEPS[name](policy, rollouts, advantages)
        results.put(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        STEPS[name](policy, rollouts, advantages)
        results.put(status("VmHWM") - before)


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads)
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        sys.exit("resident memory is read from /proc: this benchmark runs on Linux, or with --device cuda")
    a, b = gradient("ours", args), gradient("naive", args)
    difference = ((a - b).norm() / b.norm()).item()
    print(f"gradients of {args.n} rows: relative difference {difference:.1e}")
    if not difference < 1e-4:
        sys.exit("the gradients differ: there is nothing to compare")
    del a, b
    vocabulary = make(args, 1)[0].model.config.vocab_size
    logits = args.prompts * args.n * args.tokens * vocabulary * 4 / 2**20
    print(
        f"{args.prompts * args.n} rows of {args.prompt_tokens} + {args.tokens} tokens, vocabulary {vocabulary}, "
        f"{args.device}: the responses' logits alone are {logits:.0f} MiB; {args.rounds} processes of each\n"
    )
    context, measured = multiprocessing.get_context("spawn"), {name: [] for name in STEPS}
    for _ in range(args.rounds):
        for name in STEPS:
            results = context.SimpleQueue()
            child = context.Process(target=peak, args=(name, args, results))
            child.start()
            child.join()
            if child.exitcode:
                sys.exit(f"the process of {name!r} ended with {child.exitcode}: out of memory? Try fewer --prompts")
            measured[name].append(results.get() / 2**20)
    ratios = [a / b for a, b in zip(measured["ours"], measured["naive"])]
    row = ["peak over the memory before, MiB", *(measure.spread(measured[name], ".0f") for name in STEPS)]
    row += [measure.spread(ratios), measure.verdict(measure.quartiles(ratios)[0], BAR, at_most=True)]
    measure.print_table(["", *STEPS, "ours / naive", ""], [row])
    measure.write_json(args.json, machine, {"mib": measured, "ratios": ratios, "gradient_difference": difference})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
