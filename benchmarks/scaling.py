"""How the seconds of our step grow with samples, response length, prompts and model size, and with k.

    python benchmarks/scaling.py

The step is that of step.py (sample, verify, advantages, policy_gradient_step), with random weights, responses of
full length and 0/1 rewards with solve rates like the embedded task's. One factor is varied at a time; the settings take
turns. `every row` is the estimator `mean` on graded rewards: no row is left out of the training pass.
"""

import functools
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import step
import tyro

from verifiers import load_task

BASE = {"prompts": 8, "n": 8, "k": 4, "tokens": 16, "hidden": 192, "layers": 4, "case": "a"}
VARIED = (
    {},
    {"k": 2}, {"k": 8},
    {"n": 16}, {"n": 32}, {"n": 32, "k": 32},
    {"prompts": 16}, {"prompts": 32},
    {"tokens": 32}, {"tokens": 64},
    {"layers": 8}, {"hidden": 384}, {"hidden": 768},
    {"case": "b"}, {"case": "b", "n": 16}, {"case": "b", "tokens": 64}, {"case": "b", "hidden": 384},
)  # fmt: skip


@dataclass
class Args:
    rounds: int = 3
    """steps at each setting, in turn, after one that is not counted"""
    threads: int = 1
    """CPU threads"""
    device: str = step.Args.device
    """cpu or cuda"""
    json: str | None = None
    """write the numbers to this file, too"""


def next_step(ours: step.OurStep) -> None:
    """Its next step: other samples and other rewards each round, the same rewards in settings of the same shape."""
    ours(len(ours.parts))


def main(args: Args) -> None:
    machine = measure.describe_machine(args.threads)
    task, steps = load_task("arithmetic"), {}
    for varied in VARIED:
        s = BASE | varied
        policy = measure.tiny_policy(args.device, s["hidden"], s["layers"])
        problems = task.train[:: len(task.train) // s["prompts"]][: s["prompts"]]
        name = ", ".join(f"{key} {value}" for key, value in varied.items()).replace("case b", "every row") or "base"
        steps[name] = step.OurStep(policy, task, problems, s["n"], s["k"], s["tokens"], s["case"])
    measure.interleaved({name: functools.partial(next_step, ours) for name, ours in steps.items()}, args.rounds)
    print("base: " + ", ".join(f"{key} {value}" for key, value in BASE.items() if key != "case"))
    print(f"{args.device}; seconds, median [quartiles] of {args.rounds} steps\n")
    rows, results = [], []
    base = [part["total"] for part in steps["base"].parts[1:]]
    for name, ours in steps.items():
        parts = ours.parts[1:]
        total = [part["total"] for part in parts]
        middle = {key: measure.quartiles([part[key] for part in parts])[0] for key in parts[0]}
        growth = measure.quartiles([a / b for a, b in zip(total, base)])[0]
        cells = [f"{middle[key]:.3f}" for key in ("sample", "verify", "train")]
        rate = f"{middle['tokens'] / middle['total']:.0f}"
        signal = sum(part["signal"] for part in parts) / len(parts)
        rows.append([name, f"{signal:.0%}", *cells, measure.spread(total), f"{growth:.2f}", rate])
        results.append({"setting": BASE | VARIED[len(results)], "parts": parts})
    measure.print_table(
        ["", "rows with signal", "sample", "verify", "train", "total", "over base", "sampled tokens/s"], rows
    )
    measure.write_json(args.json, machine, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
