"""Do the baselines of pass@k differ in training? Four estimators of one gradient, 5 seeds each, by exact evaluation.

    python benchmarks/baselines.py                            # `suspects`, k = 8, 150 steps of 4 prompts x 16 samples
    python benchmarks/baselines.py --report                   # the table of runs that are there

Each estimator is a function of recipes/baselines.py, run by pass_at_k_pg.py --estimator FILE:NAME from the same initial
policies (tiny-0, tiny-1, ...). Policies are evaluated without sampling (exact.py) on held-out prompts. Runs that are
there are kept, so that the command can be stopped and started again.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import exact  # first: puts the repository on the path
import measure
import numpy as np
import optima
import torch
import tyro

from harness.policy import load_policy
from verifiers import BadInput, load_task

ROOT = Path(__file__).parent.parent
ESTIMATORS = {
    "u(k)": "u", "b(k+1)": "b", "(1-s) u(k) + s b(k+1)": "others", "posterior mean": "posterior",
}  # fmt: skip


@dataclass
class Args:
    k: int = 8
    """tries"""
    n: int = 16
    """samples of a prompt, more than k"""
    seeds: int = 5
    """2 to 10"""
    steps: int = 150
    """of a run"""
    prompts_per_step: int = 4
    """in a step"""
    lr: float = 2e-4
    """learning rate"""
    more: str = ""
    """further flags of pass_at_k_pg.py, in one string"""
    folder: Path = Path("runs/baselines")
    """where the table's runs are kept"""
    report: bool = False
    """make no run"""


def command(args: Args, name: str, seed: int) -> list[str]:
    """The command of one run, which leaves runs/NAME."""
    flags = f"--task suspects --model tiny-{seed} --seed {seed} --k {args.k} --n {args.n} --steps {args.steps} "
    flags += f"--prompts-per-step {args.prompts_per_step} --lr {args.lr} "
    flags += f"--eval-every 0 --eval-problems 1 --eval-n {args.k} {args.more}"  # policies are evaluated exactly instead
    where = ["--estimator", f"{ROOT / 'recipes' / 'baselines.py'}:{name}", "--run-name", f"baselines-{name}-{seed}"]
    return [sys.executable, str(ROOT / "pass_at_k_pg.py"), *flags.split(), *where]


def result(folder: Path, k: int) -> tuple[float, float, float]:
    """pass@k on held-out prompts, exact; the mean share of samples with an advantage; the median seconds of a step."""
    task, problems = load_task("suspects"), optima.problems_of()
    with torch.no_grad():
        log_pi = exact.candidate_log_probs(load_policy(str(folder / "policy"), task, "cpu"), task, problems)
    value = optima.level_weights(problems) @ exact.exact_metrics(log_pi, problems)[f"pass@{k}"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    signal = np.mean([record["nonzero_advantage"] for record in steps if "nonzero_advantage" in record])
    seconds = [json.loads(line)["seconds"] for line in (folder / "timings.jsonl").read_text().splitlines()]
    return value.item(), float(signal), float(np.median(seconds))


def main(args: Args) -> None:
    if args.k not in optima.TRIES:
        raise BadInput(f"--k must be one of {', '.join(map(str, optima.TRIES))}, not {args.k}")
    if args.n <= args.k:
        raise BadInput(f"--n must be more than --k {args.k}, which b(k+1) takes, not {args.n}")
    for seed in range(args.seeds):
        for name in ESTIMATORS.values():
            kept, made = args.folder / f"{name}-{seed}", Path("runs") / f"baselines-{name}-{seed}"
            if kept.exists() or args.report:
                continue
            shutil.rmtree(made, ignore_errors=True)  # of a run that was stopped
            if subprocess.run(command(args, name, seed)).returncode:
                raise BadInput(f"the run of {name}, seed {seed}, failed: see above")
            args.folder.mkdir(parents=True, exist_ok=True)
            shutil.move(made, kept)
    found = {x: [args.folder / f"{name}-{seed}" for seed in range(args.seeds)] for x, name in ESTIMATORS.items()}
    missing = [folder for folders in found.values() for folder in folders if not folder.exists()]
    if missing:
        raise BadInput(f"{missing[0]} is not there: run this without --report")
    values = {x: np.array([result(folder, args.k) for folder in folders]) for x, folders in found.items()}  # (S, 3)
    first = next(iter(values.values()))
    rows = []
    for x, seen in values.items():
        cells = ["{:.4f} ± {:.4f}".format(*measure.interval(seen[:, 0]))]
        less = "-" if seen is first else "{:+.4f} ± {:.4f}".format(*measure.interval(seen[:, 0] - first[:, 0]))
        rows.append([x, *cells, less, f"{seen[:, 1].mean():.3f}", f"{np.median(seen[:, 2]):.3f}"])
    head = ["", f"pass@{args.k} ± 95%", "less u(k), paired", "samples with a signal", "seconds a step"]
    measure.print_table(head, rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except BadInput as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
