"""Do the baselines of pass@k differ in training? Four estimators of one gradient, 5 seeds each, by exact evaluation.

    python benchmarks/baselines.py                            # `suspects`, k = 8, 150 steps of 4 prompts x 16 samples
    python benchmarks/baselines.py --report                   # the table of runs that are there

Each estimator is a function of recipes/baselines.py. pass_at_k_pg.py --estimator FILE:NAME runs it from the same
initial policies (tiny-0, tiny-1, ...). Policies are evaluated without sampling (exact.py) on held-out prompts. A
stopped run is resumed. A finished run is kept.
"""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import exact  # first: puts the repository on the path
import measure
import numpy as np
import optima
import reproduce

from verifiers import BadInput

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
    jobs: int = 2
    """runs at a time, each on one thread"""
    out: Path = Path("runs/baselines")
    """folder of the runs and their logs"""
    report: bool = False
    """make no run"""


class Runs(reproduce.Runs):
    def __init__(self, args: Args):
        super().__init__(args.out, list(ESTIMATORS.values()), range(args.seeds), args.jobs)
        self.flags = f"--task suspects --k {args.k} --n {args.n} --steps {args.steps} --lr {args.lr} "
        self.flags += f"--prompts-per-step {args.prompts_per_step} --eval-every 0 --eval-problems 1 --eval-n {args.k}"
        self.more, self.k = args.more, args.k

    def stages(self) -> list[list[tuple[str, int]]]:
        """The first run of a seed leaves its initial policy in the cache."""
        return [[(name, seed) for seed in self.seeds for name in names] for names in (self.names[:1], self.names[1:])]

    def command(self, name: str, seed: int) -> str:
        estimator = f"{measure.ROOT / 'recipes' / 'baselines.py'}:{name}"
        return f"pass_at_k_pg.py {self.flags} --estimator {estimator} --model tiny-{seed} --seed {seed} {self.more}"

    def evaluation(self, name: str, seed: int, folder: Path) -> dict:
        """pass@k on held-out prompts, exact; the mean share of samples with an advantage; the median seconds a step."""
        problems = optima.problems_of()
        metrics = exact.exact_metrics(reproduce.log_probs(str(folder / "policy")), problems)
        steps, timings = ([json.loads(line) for line in (folder / x).read_text().splitlines()]
                          for x in ("metrics.jsonl", "timings.jsonl"))  # fmt: skip
        return {
            "pass": (optima.level_weights(problems) @ metrics[f"pass@{self.k}"]).item(),
            "signal": np.mean([x["nonzero_advantage"] for x in steps if "nonzero_advantage" in x]),
            "seconds": np.median([x["seconds"] for x in timings]),
        }


def main(args: Args) -> None:
    if args.k not in optima.TRIES:
        raise BadInput(f"--k must be one of {', '.join(map(str, optima.TRIES))}, not {args.k}")
    if args.n <= args.k:
        raise BadInput(f"--n must be more than --k {args.k}, which b(k+1) takes, not {args.n}")
    if not 2 <= args.seeds <= 10:
        raise BadInput(f"--seeds must lie between 2 and 10, not {args.seeds}")
    runs, rows = Runs(args), []
    if not args.report:
        runs.make_all()
    if runs.failed or not all(runs.done(name, seed) for name in ESTIMATORS.values() for seed in runs.seeds):
        raise BadInput("\n".join(runs.failed) or f"not all runs are in {args.out}: run this without --report")
    for label, name in ESTIMATORS.items():
        found = [json.loads((runs.folder(name, seed) / "exact.json").read_text()) for seed in runs.seeds]
        seen = {key: np.array([row[key] for row in found]) for key in found[0]}  # (S,) each
        first = rows[0][-1] if rows else seen["pass"]
        less = measure.interval(seen["pass"] - first, "+.4f") if rows else "-"
        cells = [measure.interval(seen["pass"], ".4f"), less]
        rows.append([label, *cells, f"{seen['signal'].mean():.3f}", f"{np.median(seen['seconds']):.3f}", seen["pass"]])
    head = ["", f"pass@{args.k} ± 95%", "less u(k), paired", "samples with a signal", "seconds a step"]
    measure.print_table(head, [row[:-1] for row in rows])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measure.program(main, Args)
