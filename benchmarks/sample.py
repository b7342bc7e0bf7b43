"""Sampled tokens a second: common.sample beside transformers' generate.

    python benchmarks/sample.py
    python benchmarks/sample.py --model runs/smollm2 --prompts 8 --tokens 12     # on the task `sums`, see pretrained.py

The peer is `model.generate(do_sample=True, top_k=0, num_return_sequences=n)` on the same weights and left-padded
prompts, in the same precision (float32; bfloat16 autocast on CUDA), and it does less: ours also returns the log-prob of
every token. Tokens of a response count up to and including its end. On CUDA two cases of a random model in the shape of
Qwen2-0.5B are added, with a second peer, `generate` on weights that are bfloat16 themselves.
"""

import contextlib
import copy
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import torch
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
from harness.policy import encode_prompts, load_policy
from verifiers import load_task


@dataclass
class Args:
    model: str | None = None
    """folder of a model to sample from in place of the tiny one, on `sums` in place of `arithmetic`"""
    rounds: int = 9
    """runs of each system that are timed, in turn"""
    prompts: int = 16
    """prompts of the tiny model (64 on CUDA)"""
    n: int = 8
    """samples a prompt"""
    tokens: int = 64
    """longest response of the tiny model (256 on CUDA)"""
    threads: int = 1
    """CPU threads"""
    json: str | None = None
    """write the numbers to this file, too"""


def qwen_policy(stop: int) -> common.Policy:
    """Random weights in the shape of Qwen2-0.5B on CUDA; `stop` of its 151 936 tokens end a response (0: none)."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to("cuda").eval()
    ends = list(range(1000, 1000 + stop)) or [config.vocab_size]  # the last: just past the output layer
    return common.Policy(model, measure.tiny_policy("cpu").tokenizer, ends)


def ours(policy: common.Policy, prompts: list[list[int]], n: int, tokens: int) -> list[int]:
    """Lengths of the responses."""
    return common.sample(policy, prompts, n, tokens).mask.sum(-1).flatten().tolist()


@torch.no_grad()
def generate(policy: common.Policy, prompts: list[list[int]], n: int, tokens: int, model=None) -> list[int]:
    """Lengths of the responses. model: another model to sample from, in its own precision."""
    ids, mask = (x.to(policy.device) for x in common.padded(prompts, left=True))
    with common.autocast(policy.device) if model is None else contextlib.nullcontext():
        output = (model or policy.model).generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, num_return_sequences=n,
            max_new_tokens=tokens, eos_token_id=policy.stop_ids, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
    ended = torch.isin(output, torch.tensor(policy.stop_ids, device=output.device))
    before = ended.int().cumsum(-1) - ended.int() == 0  # no end among the earlier tokens
    return before.sum(-1).tolist()


def compare(
    name: str, policy: common.Policy, bar: float, n_prompts: int, n: int, tokens: int, rounds: int, task: str
) -> tuple:
    """A row of the table for each peer, and the numbers behind it."""
    task = load_task(task)
    problems = task.train[:: len(task.train) // n_prompts][:n_prompts]
    prompts = encode_prompts(policy, task, problems, tokens)
    peers = {"generate": lambda: generate(policy, prompts, n, tokens)}
    if policy.device.type == "cuda":
        half = copy.deepcopy(policy.model).to(torch.bfloat16)
        peers["generate, bfloat16 weights"] = lambda: generate(policy, prompts, n, tokens, half)
    sampled: dict[str, list[list[int]]] = {}
    systems = {"ours": lambda: ours(policy, prompts, n, tokens), **peers}
    times = measure.interleaved(
        {key: lambda key=key: sampled.setdefault(key, []).append(systems[key]()) for key in systems}, rounds
    )
    rates = {key: [sum(lengths) / s for lengths, s in zip(sampled[key][-rounds:], times[key])] for key in systems}
    rows, results = [], []
    for peer in peers:
        ratios = [a / b for a, b in zip(rates["ours"], rates[peer])]
        mean = [sum(map(sum, sampled[key])) / sum(map(len, sampled[key])) for key in ("ours", peer)]
        rows.append([
            f"{name}, beside {peer}", f"{mean[0]:.1f}, {mean[1]:.1f}", measure.spread(rates["ours"], ".0f"),
            measure.spread(rates[peer], ".0f"), measure.spread(ratios, ".2f"),
            measure.verdict(measure.quartiles(ratios)[0], bar, at_most=False),
        ])  # fmt: skip
        results.append({"case": name, "peer": peer, "ours": rates["ours"], "theirs": rates[peer], "ratios": ratios})
    return rows, results


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads)
    sizes = (args.prompts, args.n, args.tokens)
    if args.model:
        policy = load_policy(args.model, load_task("sums"))
        cases = [(f"{args.model}, variable length", policy, 1.0), (f"{args.model}, full length", policy, 1.0)]
    else:  # of 99 characters 5 end a response: lengths are geometric with mean 20, cut at --tokens
        cases = [
            (f"tiny, {length}", measure.tiny_policy("cpu", stop=stop), 1.5)
            for length, stop in (("full length", 0), ("variable length", 5))
        ]
    rows, results = [], []
    for name, policy, bar in cases:
        if args.model and "full" in name:
            measure.endless(policy)
        row, result = compare(name, policy, bar, *sizes, args.rounds, "sums" if args.model else "arithmetic")
        rows, results = rows + row, results + result
    if torch.cuda.is_available() and not args.model:
        for length, stop in (("full length", 0), ("variable length", 1500)):  # 1500 of 152k: mean length about 100
            row, result = compare(
                f"Qwen2-0.5B shape, {length}", qwen_policy(stop), 4.0, 64, args.n, 256, args.rounds, "arithmetic"
            )
            rows, results = rows + row, results + result
    print(
        f"{args.prompts} prompts x {args.n} samples, up to {args.tokens} tokens; {args.rounds} runs of each, in turn\n"
    )
    head = ["", "mean length: ours, peer", "ours, tokens/s", "peer, tokens/s", "ours / peer", ""]
    measure.print_table(head, rows)
    if not (args.model or torch.cuda.is_available()):
        print("no CUDA device: Qwen2-0.5B shape, 64 prompts x 8 samples x 256 tokens, bar >= 4, not measured")
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
