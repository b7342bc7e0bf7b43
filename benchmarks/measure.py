"""What the benchmarks share: machine, interleaved timing, a tiny model, tables, the pages that show them.

Importing it puts the repository's root on sys.path. `python benchmarks/x.py` then finds common.py.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

import common
import harness.policy
from harness.report import mean_and_interval, table
from verifiers import BadInput

ROOT = Path(__file__).resolve().parent.parent
# One colour an objective, in every figure of this repository: the family of an estimator's name, before its comma.
COLOURS = {
    "base": "#7f7f7f",
    "mean": "#1f77b4",  # RLOO
    "unbiased": "#d62728",  # pass@k
    "biased": "#ff9896",
    "MaxRL": "#2ca02c",
    "GRPO": "#17becf",
    "pass^k": "#8c564b",
    "majority": "#9467bd",
    "BoN-RL variational": "#b5a000",
    "BoN-RLB(P)": "#ff7f0e",
    "SFT": "#393b79",
    "BoN-SFT": "#6b6ecf",
}


def program(main: Callable, Args: type) -> None:
    """Parse the command line into Args and run main(args). --help begins with the docstring at the top of the file. A
    user's mistake ends in one line and exit code 2. SIGTERM is taken as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(sys.modules[main.__module__].__doc__)  # as it stands: tyro would join its lines
    try:
        main(tyro.cli(Args, description=""))
    except BadInput as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def machine(threads: int, *packages: str) -> dict:
    """What numbers depend on. Sets torch's number of threads. packages: names of peers."""
    torch.set_num_threads(threads)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "threads": threads, "gpu": gpu}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    return found | {"python": platform.python_version()} | versions


def in_words(machine: dict) -> str:
    """One line of text for what `machine` returns."""
    start = f"{machine['date']}; {machine['cores']} cores, {machine['threads']} thread(s), {machine['gpu'] or 'no GPU'}"
    return f"{start}; " + ", ".join(f"{name} {version}" for name, version in list(machine.items())[4:])


def now() -> float:
    """The clock in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(functions: Sequence[Callable], rounds: int) -> list[list[tuple]]:
    """Of each function, in each round, its seconds and what it returned. Every round runs all of them: other load on
    the machine strikes them alike. One more round goes before and is not counted."""
    found = [[] for _ in functions]
    for function, row in [*zip(functions, found)] * (1 + rounds):
        start, result = now(), function()
        row.append((now() - start, result))
    return [row[1:] for row in found]


def spread(values: Sequence[float]) -> str:
    """Median [first quartile, third quartile], to three digits."""
    low, middle, high = (f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{middle} [{low}, {high}]"


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± half-width of its 95% interval, or the one value. form: of the mean; "+" in it is for the mean alone."""
    mean, half = mean_and_interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(half) else f" ± {half:{form.lstrip('+')}}")


def label(axis, labels: Sequence[tuple[Sequence[float], str, str]]) -> None:
    """Write each (point, text, colour) at the nearest place where it covers no curve and no other text. A thin line
    goes to a point that is farther off. All else is drawn before, and the layout stands."""
    from matplotlib.collections import LineCollection
    from matplotlib.text import Text

    renderer, taken = axis.figure.canvas.get_renderer(), []
    bars = [path for bar in axis.findobj(LineCollection) for path in bar.get_paths()]  # of errors
    curves = [path.interpolated(20).vertices for path in (*(line.get_path() for line in axis.lines), *bars)]
    drawn = axis.transData.transform(np.vstack(curves))  # (D, 2) in pixels
    rings = [(distance, (turn + 2) * math.pi / 8) for distance in (9, 14, 20, 28, 38, 50, 64, 80) for turn in range(16)]
    for point, text, colour in labels:
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
        note = axis.annotate(text, point, (0, 0), textcoords="offset points", color=colour, fontsize=8,
                             ha="center", va="center", arrowprops=line)  # fmt: skip
        half = Text.get_window_extent(note, renderer).width * 36 / axis.figure.dpi  # half its width in points
        for distance, angle in rings:
            note.set_position(((distance + half) * math.cos(angle), distance * math.sin(angle)))
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)
            covers = ((box.min < drawn) & (drawn < box.max)).all(-1).any()
            free = not covers and not any(box.overlaps(other) for other in taken)
            if free and axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max):
                break
        note.arrow_patch.set_visible(distance > 14)
        taken.append(box)


def print_table(head: Sequence[str], rows: Sequence[Sequence]) -> None:
    print(table([[str(cell) for cell in row] for row in (head, *rows)]) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def marked(name: str) -> re.Pattern:
    """What stands between <!-- NAME:begin --> and <!-- NAME:end -->."""
    return re.compile(f"(?<=<!-- {name}:begin -->\n).*?(?=\n<!-- {name}:end -->)", re.S)


def publish(tables: dict[str, str]) -> None:
    """Paste tables, by the names of their markers, into README.md and the pages of docs/."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = page.read_text()
        for name, new in tables.items():
            text = marked(name).sub(lambda _: new, text)
        page.write_text(text)


def published(name: str, page: str) -> str:
    """What stands between the markers of this name, on a page such as "docs/speed.md"."""
    return marked(name).search((ROOT / page).read_text())[0]


def records_json(facts: dict) -> str:
    """The facts as JSON that reads well in a diff: a line for each record of a list and each entry of a dict."""

    def text(value) -> str:
        if not value or not isinstance(value, (dict, list)):
            return json.dumps(value)
        if isinstance(value, list):
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]"
        return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n}"

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in facts.items()) + "\n}\n"


def tiny_policy(
    device: str, hidden: int = 192, layers: int = 4, vocabulary: int | None = None, stop: int = 0
) -> common.Policy:
    """A small Llama with random weights, the same at every call, on the character tokenizer of the embedded tasks.

    stop: how many ordinary characters, the digits first, end a response; each has a probability of about 1/99. With 0
    every response has full length.
    """
    tokenizer = harness.policy.tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=None,  # tokenizer and stop_ids know it
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device).eval()
    ends = tokenizer.convert_tokens_to_ids([*"0123456789abcdefghijklmnopqrstuvwxyz"[:stop]])
    return common.Policy(model, tokenizer, ends) if stop else endless(common.Policy(model, tokenizer, []))


def endless(policy: common.Policy) -> common.Policy:
    """The policy, changed: its end token lies just past the output layer, and in any system all responses have full
    length."""
    policy.tokenizer.add_special_tokens({"eos_token": "<never>"})
    policy.stop_ids = [policy.tokenizer.eos_token_id]
    policy.model.config.eos_token_id = policy.model.generation_config.eos_token_id = None
    return policy
