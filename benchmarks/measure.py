"""What the benchmarks share: the machine in two lines, interleaved timing, the tiny model, tables.

Importing it puts the repository's root on sys.path, so that `python benchmarks/x.py` finds common.py.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
import harness.policy
from harness.report import mean_and_interval as interval  # noqa: F401


def machine(threads: int, *packages: str) -> dict:
    """What numbers depend on. packages: peers, by name."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(load, 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }


def describe_machine(threads: int, *packages: str) -> dict:
    """Set the number of threads; print and return what the numbers below depend on. packages: peers, by name."""
    torch.set_num_threads(threads)
    found = machine(threads, *packages)
    print(
        f"{found['cpu']}, {found['cores']} cores, load {found['load']} at the start; {found['threads']} "
        f"thread(s); GPU: {found['gpu'] or 'none'}"
    )
    names = ("python", "torch", "transformers", *packages)
    print(", ".join(f"{name} {found[name]}" for name in names) + "\n")
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> float:
    """The clock in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable) -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    start = now()
    function()
    return now() - start


def interleaved(functions: dict[str, Callable], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each round. Every round runs all of them, so that what else the machine does strikes
    them alike; the first `warm_up` rounds are not counted."""
    rows = [{name: seconds(function) for name, function in functions.items()} for _ in range(warm_up + rounds)]
    return {name: [row[name] for row in rows[warm_up:]] for name in functions}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Median [first quartile, third quartile]."""
    middle, low, high = quartiles(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def verdict(value: float, bar: float, at_most: bool) -> str:
    """The bar and whether the value meets it."""
    met = value <= bar if at_most else value >= bar
    return f"bar {'<=' if at_most else '>='} {bar:.3g}: {'met' if met else 'NOT met'}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column left, the others right."""
    rows = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip())
    print()


def write_json(path: str | None, machine: dict, results) -> None:
    """The numbers behind the tables, if a path was given."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def records_json(facts: dict) -> str:
    """The facts as JSON that reads well in a diff: a line for each record of a list and each entry of a dict."""
    parts = []
    for name, value in facts.items():
        rows, ends = [], ""
        if isinstance(value, dict):
            rows, ends = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()], "{}"
        elif isinstance(value, list):
            rows, ends = [json.dumps(row) for row in value], "[]"
        whole = f"{ends[0]}\n  " + ",\n  ".join(rows) + f"\n{ends[1]}" if rows else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {whole}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tiny_policy(
    device: str, hidden: int = 192, layers: int = 4, vocabulary: int | None = None, stop: int = 0
) -> common.Policy:
    """A small Llama with random weights, the same at every call, on the character tokenizer of the embedded tasks.

    stop: how many ordinary characters, the digits first, end a response; their probability is about 1/99 each. With 0
    nothing does: the end token has an id just past the model's output layer, so that every response is of full length
    in any system, without a change to how it samples.
    """
    tokenizer = harness.policy.tiny_tokenizer()
    size = vocabulary or len(tokenizer)
    if not stop:
        tokenizer.add_special_tokens({"eos_token": "<never>"})
    config = LlamaConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=None,  # tokenizer and stop_ids know it
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device).eval()
    ends = [tokenizer.convert_tokens_to_ids(c) for c in "0123456789abcdefghijklmnopqrstuvwxyz"[:stop]]
    return common.Policy(model, tokenizer, ends or [tokenizer.eos_token_id])


def endless(policy: common.Policy) -> common.Policy:
    """The policy, changed so that nothing ends a response, as in `tiny_policy`: in any system all have full length."""
    policy.tokenizer.add_special_tokens({"eos_token": "<never>"})
    policy.stop_ids = [policy.tokenizer.eos_token_id]
    policy.model.config.eos_token_id = policy.model.generation_config.eos_token_id = None
    return policy
