"""Do the baselines of pass@k differ in training? Four estimators of one gradient, 5 seeds each, by exact evaluation.

    python benchmarks/baselines.py                            # --task suspects, k = 8, n = 16, 150 steps of 16 prompts
    python benchmarks/baselines.py --report                   # the table of runs that are there

Each estimator is a function of recipes/baselines.py, run by pass_at_k_pg.py --estimator FILE:NAME from the same initial
policies (tiny-0, tiny-1, ...). Runs that are there are kept, so that the command can be stopped and started again. What
is compared is what the script's last evaluation says; a task that evaluates exactly leaves no noise of sampling in it.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import measure  # first: puts the repository on the path
import numpy as np
import tyro

from verifiers import BadInput

ROOT = Path(__file__).parent.parent
ESTIMATORS = {
    "u(k)": "u", "b(k+1)": "b", "(1-s) u(k) + s b(k+1)": "others", "posterior mean": "posterior",
}  # fmt: skip


@dataclass
class Args:
    task: str = "suspects"
    """which problems, see verifiers/"""
    k: int = 8
    """tries"""
    n: int = 16
    """samples of a prompt, more than k"""
    seeds: int = 5
    """2 to 10"""
    steps: int = 150
    """of a run"""
    prompts_per_step: int = 16
    """in a step"""
    lr: float = 1e-4
    """constant"""
    more: str = ""
    """further flags of pass_at_k_pg.py, in one string"""
    folder: Path = Path("runs/baselines")
    """where the table's runs are kept"""
    report: bool = False
    """make no run"""


def command(args: Args, name: str, seed: int) -> list[str]:
    """The command of one run, which leaves runs/NAME."""
    flags = f"--task {args.task} --model tiny-{seed} --seed {seed} --k {args.k} --n {args.n} --steps {args.steps} "
    flags += f"--prompts-per-step {args.prompts_per_step} --lr {args.lr} {args.more}"
    where = ["--estimator", f"{ROOT / 'recipes' / 'baselines.py'}:{name}", "--run-name", f"baselines-{name}-{seed}"]
    return [sys.executable, str(ROOT / "pass_at_k_pg.py"), *flags.split(), *where]


def result(folder: Path, k: int) -> tuple[float, float, float]:
    """pass@k at the last evaluation, the share of samples with a signal and the median seconds of a step."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [json.loads(line)["seconds"] for line in (folder / "timings.jsonl").read_text().splitlines()]
    last = [record for record in log if "eval" in record][-1]["eval"]["all"][f"pass@{k}"][0]
    return last, float(np.mean([record["signal"] for record in log if "signal" in record])), float(np.median(seconds))


def main(args: Args) -> None:
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
