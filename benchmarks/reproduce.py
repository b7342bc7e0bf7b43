"""The papers' claims (B1-B3, M1-M5, C1-C5) and three questions neither paper asks, on the embedded tasks, over seeds.

    python benchmarks/reproduce.py            # 5 seeds
    python benchmarks/reproduce.py --quick    # 3 seeds of three settings: B1-B3, some of M2, C2, C5

Every number comes from RUNS, which are commands to be run by themselves, too; `claims` says what is made of them. Both
were fixed before the seeds were run. A run that was stopped is resumed, one that is done is not made again, those of
--quick neither. Writes results.json, table.md and figures to --out. Differences are paired by seed; ± is a 95%
confidence interval over seeds (Student's t). The seeds vary the order of prompts and the sampling; initial policy and
held-out problems are the same.
"""

import hashlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import measure  # first: puts the repository on the path
import numpy as np
import torch
import tyro
from tqdm import tqdm

import bandit
from verifiers import BadInput

ROOT = Path(__file__).resolve().parent.parent

PASS = "pass_at_k_pg.py --task arithmetic --log-kl --steps 150 --eval-every 30"  # 64 prompts x 16 samples a step
PROGRAMS = "pass_at_k_pg.py --task programs --k 8 --steps 120 --eval-every 0"
MAJORITY = "majority_pg.py --k 8 --log-kl --steps 100 --eval-every 25"
BON = "bon_rl.py --task arithmetic --prompts-per-step 32 --steps 150 --eval-every 0"  # 32 prompts x 24 samples a step
LEARNED = f"{BON} --verifier learned --N 8"
SFT = "bon_sft.py --task arithmetic --prompts-per-step 32 --steps 150 --eval-every 0 --eval-N 8"
SCORED = (
    "bon_rl.py --task arithmetic --N 8 --steps 0 --verifier learned --verifier-model {run:verifier}/verifier "
    "--model {run:%s}/policy"
)

# Each is run for every seed, those of one tuple one after the other. {run:NAME}: the folder of that run.
RUNS = {
    "mean": f"{PASS} --k 4 --estimator mean",  # with --n 16 it is the same for every k
    "k2": f"{PASS} --k 2",
    "k4": f"{PASS} --k 4",
    "k8": f"{PASS} --k 8",
    "k16": f"{PASS} --k 16",
    "k4-biased": f"{PASS} --k 4 --estimator biased",
    "k4-n4": f"{PASS} --k 4 --n 4 --prompts-per-step 256",  # n = k, as many samples a step
    "hard-mean": f"{PASS} --k 8 --estimator mean --levels 4 5",
    "hard-k8": f"{PASS} --k 8 --levels 4 5",
    "programs-mean": f"{PROGRAMS} --estimator mean",
    "programs-k8": PROGRAMS,
    "vote-mean": f"{MAJORITY} --estimator mean",
    "vote-biased": f"{MAJORITY} --estimator biased",
    "bon-mean": f"{BON} --N 8 --estimator mean",
    "bon-exact": f"{BON} --N 8 --estimator exact",
    "bon-variational": f"{BON} --N 8 --estimator variational",
    "bon-rlb-positive": f"{BON} --N 8 --estimator rlb-positive",
    "bon-exact-N2": f"{BON} --N 2 --n 24 --estimator exact",
    "bon-exact-N16": f"{BON} --N 16 --n 24 --estimator exact",
    "learned-mean": f"{LEARNED} --estimator mean",
    "learned-exact": f"{LEARNED} --estimator exact",
    "learned-variational": f"{LEARNED} --estimator variational",
    "sft": (f"{SFT} --N 1", SCORED % "sft"),
    "bon-sft": (f"{SFT} --N 8", SCORED % "bon-sft"),
}

# Run once, before: they leave the warm-started policies and the learned verifier in the cache, or in their folder.
FIRST = {
    "chain": "majority_pg.py --steps 0 --eval-problems 1",
    "arithmetic": "pass_at_k_pg.py --task arithmetic --steps 0 --eval-problems 1",
    "programs": "pass_at_k_pg.py --task programs --steps 0 --eval-problems 1",
    "verifier": "bon_rl.py --task arithmetic --N 8 --steps 0 --verifier learned",
}
QUICK = ("mean", "k16", "bon-exact")  # chosen when all seeds had been seen, for what they decide in ten minutes

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}  # a run's: one thread, and a log that can be read


@dataclass
class Args:
    quick: bool = False
    """three seeds of three settings, which the whole takes over"""
    seeds: int = 5
    """2 to 10"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, each on one thread"""
    out: Path = Path("runs/reproduce")
    """folder of the runs, their logs and the results"""
    report: bool = False
    """run nothing, report what there is"""


# ---------------------------------------------------------------------------------------------------------------------
# What is claimed
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """One comparison: it holds where `value`, a number a seed, is positive beyond its confidence interval."""

    claim: str
    paper: str
    what: str
    value: Callable[["Results"], float]


def claims() -> list[Claim]:
    """What the papers saw and what is compared here, as positive numbers where it holds."""

    def less(metric, run, other, level="all"):
        return lambda r: r.change(run, metric, level) - r.change(other, metric, level)

    def gain(metric, run, level="all", temperature=None):
        return lambda r: r.change(run, metric, level, temperature)

    def loss(metric, run):
        return lambda r: -r.change(run, metric)

    def votes_at_equal_kl(r):
        """maj@8 at the end of majority training, less that of mean training where its KL is the same."""
        (kl, votes), (other_kl, other) = (
            (kl_at_evaluations(r.log(run)), [x["all"]["maj@8"][0] for x in r.evaluations(run)])
            for run in ("vote-biased", "vote-mean")
        )
        return votes[-1] - np.interp(kl[-1], np.maximum.accumulate(other_kl), other)

    hard = ("4", "5")
    m2 = "the advantage over the baseline grows with k (Fig. 3)"
    m3 = "hard data: the baseline wins the mean, loses pass@k (Fig. 4)"
    m4 = "code: pass@1 is traded for pass@8, gains out to pass@100 (Fig. 5)"
    c1 = "BoN-RL-V, verifier selects: Best-of-32 26.8 to 30.8%"
    c2 = "BoN-RL-S, reward selects: pass@32 60.0 to 67.0%"
    c3 = "BoN-RLB(P): pass@16 61.6 to 67.1%; plain RL lowers it to 59.8%"
    c4 = "plain SFT lowers Best-of-N accuracy, BoN-SFT does not"
    c5 = "gains hold at other N and temperatures"
    ours = "neither paper"
    return [
        Claim("M1", "pass@k training at least the baseline on pass@4, by level (Fig. 2)",
              "pass@4, k = 4 less mean", less("pass@4", "k4", "mean")),
        *(Claim("M1", "", f"the same, level {x}", less("pass@4", "k4", "mean", str(x))) for x in range(1, 6)),
        Claim("M2", m2, "advantage at k = 16 less that at k = 2",
              lambda r: less("pass@16", "k16", "mean")(r) - less("pass@2", "k2", "mean")(r)),
        *(Claim("M2", "", f"pass@{k}, k = {k} less mean", less(f"pass@{k}", f"k{k}", "mean")) for k in (2, 4, 8, 16)),
        Claim("M3", m3, "pass@1, mean less k = 8, on levels 4 and 5", less("pass@1", "hard-mean", "hard-k8", hard)),
        Claim("M3", "", "pass@8, k = 8 less mean, the same", less("pass@8", "hard-k8", "hard-mean", hard)),
        Claim("M3", "", "pass@32, k = 8 less mean, the same", less("pass@32", "hard-k8", "hard-mean", hard)),
        Claim("M4", m4, "pass@1, mean less k = 8", less("pass@1", "programs-mean", "programs-k8")),
        Claim("M4", "", "pass@8, k = 8 less mean", less("pass@8", "programs-k8", "programs-mean")),
        Claim("M4", "", "pass@32, k = 8 less mean", less("pass@32", "programs-k8", "programs-mean")),
        Claim("M5", "majority training wins at majority@k", "maj@8, biased less mean",
              less("maj@8", "vote-biased", "vote-mean")),
        Claim("M5", "", "the same at equal KL (asked when the first runs were seen)", votes_at_equal_kl),
        Claim("C1", c1, "bon@8, variational, after less before", gain("bon@8", "learned-variational")),
        Claim("C1", "", "bon@32, the same", gain("bon@32", "learned-variational")),
        Claim("C1", "", "bon@8, exact, after less before", gain("bon@8", "learned-exact")),
        Claim("C1", "", "bon@8, exact less mean", less("bon@8", "learned-exact", "learned-mean")),
        Claim("C1", "", "bon@32, exact less mean", less("bon@32", "learned-exact", "learned-mean")),
        Claim("C2", c2, "pass@8, variational, after less before", gain("pass@8", "bon-variational")),
        Claim("C2", "", "pass@32, variational, after less before", gain("pass@32", "bon-variational")),
        Claim("C2", "", "pass@32, exact, after less before", gain("pass@32", "bon-exact")),
        Claim("C3", c3, "pass@16, BoN-RLB(P), after less before", gain("pass@16", "bon-rlb-positive")),
        Claim("C3", "", "pass@16, mean, before less after", loss("pass@16", "bon-mean")),
        Claim("C3", "", "pass@16, BoN-RLB(P) less mean", less("pass@16", "bon-rlb-positive", "bon-mean")),
        Claim("C3", "", "pass@32, BoN-RLB(P) less mean", less("pass@32", "bon-rlb-positive", "bon-mean")),
        Claim("C4", c4, "bon@8, plain SFT, before less after", lambda r: -r.scored("sft", "bon@8")),
        Claim("C4", "", "bon@8, BoN-SFT, after less before", lambda r: r.scored("bon-sft", "bon@8")),
        Claim("C4", "", "bon@8, BoN-SFT less plain SFT",
              lambda r: r.scored("bon-sft", "bon@8") - r.scored("sft", "bon@8")),
        Claim("C5", c5, "trained for N = 8: pass@2", gain("pass@2", "bon-exact")),
        Claim("C5", "", "trained for N = 8: pass@16", gain("pass@16", "bon-exact")),
        Claim("C5", "", "trained for N = 8: pass@8 at temperature 0.7", gain("pass@8", "bon-exact", temperature=0.7)),
        Claim("C5", "", "trained for N = 8: pass@8 at temperature 1.3", gain("pass@8", "bon-exact", temperature=1.3)),
        Claim("C5", "", "trained for N = 2: pass@16", gain("pass@16", "bon-exact-N2")),
        Claim("C5", "", "trained for N = 16: pass@2", gain("pass@2", "bon-exact-N16")),
        Claim("C5", "", "verifier selects: bon@8 at temperature 0.7", gain("bon@8", "learned-exact", temperature=0.7)),
        Claim("C5", "", "verifier selects: bon@8 at temperature 1.3", gain("bon@8", "learned-exact", temperature=1.3)),
        Claim("E1", ours, "pass@4: n = 16 of 64 prompts less n = k = 4 of 256", less("pass@4", "k4", "k4-n4")),
        Claim("E2", ours, "pass@4, unbiased less biased", less("pass@4", "k4", "k4-biased")),
        Claim("E3", ours, "pass@32, k = 16 less k = 4", less("pass@32", "k16", "k4")),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class Runs:
    """Runs the commands in `out`, several at a time; each in out/runs/NAME-sSEED-HASH, the hash being the command's."""

    def __init__(self, args: Args):
        self.args, self.processes, self.stopping, self.failed = args, set(), False, []
        self.seeds = 3 if args.quick else args.seeds
        runs = {name: RUNS[name] for name in QUICK} if args.quick else RUNS
        self.commands = {name: c if isinstance(c, tuple) else (c,) for name, c in runs.items()}

    def command(self, name: str, seed: int, part: int = 0) -> str:
        """The command of a run, without its name."""
        command = FIRST[name] if name in FIRST else f"{self.commands[name][part]} --seed {seed}"
        while "{run:" in command:
            before, _, rest = command.partition("{run:")
            other, _, after = rest.partition("}")
            command = f"{before}runs/{self.folder(other, 0 if other in FIRST else seed).name}{after}"
        return command

    def folder(self, name: str, seed: int, part: int = 0) -> Path:
        command = self.command(name, seed, part)
        digest = hashlib.sha256(command.encode()).hexdigest()[:6]
        return self.args.out / "runs" / "-".join(filter(None, [name, "scored" * part, f"s{seed}", digest]))

    def done(self, folder: Path) -> bool:
        return (folder / "curves.png").exists()  # what a script writes last

    def run(self, name: str, seed: int) -> None:
        """Run what is not done yet of one run, its parts in turn; a failure is kept in `failed` and stops no other."""
        for part in range(1 if name in FIRST else len(self.commands[name])):
            folder = self.folder(name, seed, part)
            if self.done(folder) or self.stopping:
                continue
            script, *flags = shlex.split(self.command(name, seed, part))
            if (folder / "args.json").exists():
                flags = ["--resume", f"runs/{folder.name}"]
            else:
                flags += ["--run-name", folder.name]
            (self.args.out / "logs").mkdir(parents=True, exist_ok=True)
            log = self.args.out / "logs" / f"{folder.name}.txt"
            with open(log, "a") as file:
                process = subprocess.Popen(
                    [sys.executable, ROOT / script, *flags], cwd=self.args.out, stdout=file, stderr=file,
                    stdin=subprocess.DEVNULL, env=os.environ | ENVIRONMENT, start_new_session=True,
                )  # fmt: skip
                self.processes.add(process)
                process.wait()
                self.processes.discard(process)
            if not self.done(folder) and not self.stopping:
                self.failed.append(f"{folder.name}: see {log}")
                return

    def run_all(self) -> None:
        """All of them, seed by seed. On Ctrl-C the runs save what they have, and KeyboardInterrupt is raised."""
        jobs = [(name, seed) for seed in range(self.seeds) for name in self.commands]
        first = ["arithmetic"] if self.args.quick else [name for name in FIRST if name != "arithmetic"]
        with ThreadPoolExecutor(self.args.jobs) as pool, tqdm(total=len(jobs) + len(first), unit="run") as bar:
            try:
                for stage in ([(name, 0) for name in first], jobs):
                    for future in [pool.submit(self.run, *job) for job in stage]:
                        future.result()
                        bar.update()
                        bar.set_postfix(failed=len(self.failed))
            except KeyboardInterrupt:
                self.stopping = True
                for process in list(self.processes):
                    process.terminate()  # a run in training saves first
                raise


class Results:
    """What the runs of one seed came to. Raises KeyError where a run is not done."""

    def __init__(self, runs: Runs, seed: int):
        self.runs, self.seed = runs, seed
        self.read = {}  # name -> commands of the runs that were looked at

    def log(self, name: str, part: int = 0) -> list[dict]:
        if name not in self.runs.commands or not self.runs.done(folder := self.runs.folder(name, self.seed, part)):
            raise KeyError(name)
        self.read[name] = self.runs.commands[name]
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def evaluations(self, name: str, temperature: float | None = None, part: int = 0) -> list[dict]:
        """Each: level -> metric -> [mean, standard error over problems], in the order of steps."""
        key, what = ("eval", None) if temperature is None else ("result", temperature)
        found = [record[key] for record in self.log(name, part) if key in record and record.get("eval_at") == what]
        if not found:  # other temperatures are not evaluated by the run itself any more
            raise KeyError(name)
        return found

    def change(self, name: str, metric: str, level="all", temperature: float | None = None) -> float:
        """After less before; level: one, or several whose mean counts."""
        first, *_, last = self.evaluations(name, temperature)
        levels = (level,) if isinstance(level, str) else level
        return sum(last[x][metric][0] - first[x][metric][0] for x in levels) / len(levels)

    def scored(self, name: str, metric: str) -> float:
        """Change under the learned verifier of a policy that was trained without; the same before for all."""
        (after,), before = self.evaluations(name, part=1), self.evaluations("learned-mean")[0]
        return after["all"][metric][0] - before["all"][metric][0]


def over_seeds(runs: Runs, value: Callable[[Results], float | list[float]]) -> tuple[np.ndarray, dict[str, tuple]]:
    """`value` of each seed whose runs are done, (seeds,) or (seeds, m), and the runs that it read, by name."""
    values, read = [], {}
    for seed in range(runs.seeds):
        result = Results(runs, seed)
        try:
            values.append(value(result))
            read = result.read
        except KeyError:
            pass
    return np.array(values), read


def verdict(mean: float, ci: float) -> str:
    return "holds" if mean > ci else "does not" if mean < -ci else "not decidable"


def bandit_rows(out: Path) -> list[dict]:
    """B1-B3 on the bandit of Figure 1, against both readings of its baseline, and its figure."""
    args = bandit.Args(figure=out / "bandit.png")
    runs = {name: bandit.trajectory(args, name) for name in ("mean x k", "mean", "unbiased", "biased")}
    bandit.save_figure(args.figure, runs, torch.linspace(0, 3, 61, dtype=torch.float64), args.k)
    ours, one_nat = runs["unbiased"], torch.tensor([1.0], dtype=torch.float64)
    rows = []
    for baseline in ("mean x k", "mean"):
        less, theirs = f"unbiased less {baseline}", runs[baseline]
        at_kl = bandit.mean_at_kl(ours, one_nat) - bandit.mean_at_kl(theirs, one_nat)  # (1, groups of seeds)
        for claim, paper, what, values in (
            ("B1", "bandit: the mean gradient raises the mean reward fastest (Fig. 1 left)",
             f"{baseline} less unbiased, step 20", (theirs - ours)[20, 0]),
            ("B2", "per unit of KL the k-sample gradients have more mean reward (Fig. 1 middle)",
             f"{less}, KL 1.0", at_kl[0]),
            ("B3", "pass@k rises much faster with the k-sample gradients (Fig. 1 right)",
             f"{less}, step 400", (ours - theirs)[400, 1]),
        ):  # fmt: skip
            mean, ci = bandit.mean_and_ci(values)
            rows.append({
                "claim": claim, "paper": paper, "what": what, "mean": mean, "ci95": ci, "verdict": verdict(mean, ci),
                "seeds": args.seeds, "runs": {"bandit": "bandit.py"},
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["claim"])


def claim_rows(runs: Runs) -> list[dict]:
    """The rows of all claims whose runs are done for two seeds or more."""
    rows = []
    for claim in claims():
        values, read = over_seeds(runs, claim.value)
        if len(values) > 1:
            mean, ci = map(float, measure.interval(values))
            rows.append({
                "claim": claim.claim, "paper": claim.paper, "what": claim.what, "mean": mean, "ci95": ci,
                "verdict": verdict(mean, ci), "seeds": len(values), "values": values.tolist(), "runs": read,
            })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a row a claim, with a line for each comparison, and the names of the runs that it is made of."""
    head = ("", "what the papers saw", "what is compared here", "mean ± 95%", "verdict", "runs")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim, group in itertools.groupby(rows, key=lambda row: row["claim"]):
        group = list(group)
        seen = [f"{row['mean']:+.3f} ± {row['ci95']:.3f}" for row in group]
        runs = ", ".join(dict.fromkeys(name for row in group for name in row["runs"]))
        columns = [[row["what"] for row in group], seen, [row["verdict"] for row in group]]
        cells = [claim, group[0]["paper"], *("<br>".join(column) for column in columns), runs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


ESTIMATORS = ("mean", "exact", "variational")
PANELS = {  # figure -> its panels: metric, title, run -> label
    "pass_at_k": [
        ("pass", "trained for one try or for four", {"mean": "the mean reward", "k4": "pass@4"}),
        ("pass", "trained for k tries", {"mean": "k = 1"} | {f"k{k}": f"k = {k}" for k in (2, 4, 8, 16)}),
        ("pass", "programs", {"programs-mean": "the mean reward", "programs-k8": "pass@8"}),
    ],
    "best_of_n": [
        ("pass", "the reward selects, N = 8", {f"bon-{x}": x for x in (*ESTIMATORS, "rlb-positive")}),
        ("bon", "a learned verifier selects, N = 8", {f"learned-{x}": x for x in ESTIMATORS}),
        ("maj", "majority, k = 8", {"vote-mean": "mean", "vote-biased": "biased"}),
    ],
}
TRADEOFF = {"mean": "mean", "k4-biased": "biased, k = 4", "k4": "k = 4", "k16": "k = 16"}


def save_figures(runs: Runs, out: Path) -> None:
    """pass_at_k.png, best_of_n.png and tradeoff.png, of the runs that are done for two seeds or more."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    js = [1, 2, 4, 8, 16, 32]

    def draw(axis, x, values: np.ndarray, label: str) -> None:
        """A line with its 95% band; values: (seeds, points)."""
        if len(values) > 1:
            mean, ci = measure.interval(values)
            (line,) = axis.plot(x, mean, marker="o", markersize=3, label=label)
            axis.fill_between(x, mean - ci, mean + ci, alpha=0.2, color=line.get_color())
            axis.legend()

    for name, panels in PANELS.items():
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        for axis, (metric, title, lines) in zip(axes, panels):
            axis.axhline(0, color="gray", linewidth=0.8)
            axis.set(xscale="log", xlabel="tries j", ylabel=f"change of {metric}@j, held out", title=title)
            axis.set_xticks(js, map(str, js))
            axis.minorticks_off()
            for run, label in lines.items():
                changes, _ = over_seeds(runs, lambda r: [r.change(run, f"{metric}@{j}") for j in js])
                draw(axis, js, changes, label)
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, j in zip(axes, (1, 4, 32)):
        axis.set(xlabel="KL(policy, initial policy), nats", ylabel=f"pass@{j}", title=f"pass@{j} against KL")
        for run, label in TRADEOFF.items():
            spent, _ = over_seeds(runs, lambda r: kl_at_evaluations(r.log(run)))
            levels, _ = over_seeds(runs, lambda r: [x["all"][f"pass@{j}"][0] for x in r.evaluations(run)])
            draw(axis, spent.mean(0) if len(spent) else [], levels, label)
    figure.savefig(out / "tradeoff.png", dpi=120)
    plt.close(figure)


def kl_at_evaluations(log: list[dict]) -> list[float]:
    """The mean KL of the ten steps up to each evaluation; 0 at the first."""
    steps = [record["step"] for record in log if "eval" in record]
    kl = {record["step"]: record["kl"] for record in log if "kl" in record}
    near = [[kl[s] for s in range(step - 9, step + 1) if s in kl] for step in steps]
    return [sum(values) / len(values) if values else 0.0 for values in near]


def main(args: Args) -> None:
    if not 2 <= args.seeds <= 10 or args.jobs < 1:
        raise BadInput("--seeds must lie between 2 and 10, --jobs be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = measure.describe_machine(1)
    runs, start = Runs(args), time.perf_counter()
    if not args.report:
        try:
            runs.run_all()
        except KeyboardInterrupt:
            raise BadInput(f"stopped; the same command goes on with what is in {args.out}") from None
    rows = bandit_rows(args.out) + claim_rows(runs)
    save_figures(runs, args.out)
    minutes = (time.perf_counter() - start) / 60
    result = {"machine": machine, "minutes": minutes, "commands": runs.commands, "rows": rows}
    (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    print(f"\n{args.out}: results.json, table.md, figures; {minutes:.0f} minutes")
    if runs.failed:
        raise BadInput("these runs failed, their claims lack seeds:\n" + "\n".join(runs.failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=__doc__))
    except BadInput as mistake:
        sys.exit(f"error: {mistake}")
