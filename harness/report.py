"""What a run tells at its end: tables, figures, samples. To compare runs: python -m harness.report runs/a runs/b ..."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from verifiers import BadInput, Problem

SEEDS_DIFFER_IN = ("seed", "run_name", "resume", "save_every", "show_samples", "tensorboard")


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of per-problem values (P,) and its standard error over problems (nan for one problem)."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def by_level(metrics: dict[str, torch.Tensor], problems: Sequence[Problem]) -> dict[str, dict[str, tuple]]:
    """Mean and standard error of each metric (P,) over all problems ("all") and over each level's ("1", "2", ...)."""
    levels = sorted({problem.level for problem in problems if problem.level is not None})
    groups = {"all": torch.arange(len(problems))}
    groups |= {str(x): torch.tensor([i for i, p in enumerate(problems) if p.level == x]) for x in levels}
    return {x: {name: mean_and_error(values[at]) for name, values in metrics.items()} for x, at in groups.items()}


def show_samples(problems: Sequence[Problem], responses: list[list[str]], rewards: torch.Tensor, count: int) -> None:
    """Print the first response to each of `count` problems, evenly spaced, with its reward; rewards: (P, n). All text
    is escaped: a model's must not drive the terminal."""
    count = min(count, len(problems))
    for i in (place * len(problems) // count for place in range(count)):
        tqdm.write(f"{rewards[i, 0].item():g}  {ascii(problems[i].prompt[-200:])} -> {ascii(responses[i][0][:1000])}")


def comparison_table(
    before: dict, after: dict | None, best: dict, problems: Sequence[Problem], columns: Sequence[str]
) -> str:
    """Per-problem metrics, name -> (P,), by level: before -> after, the paired change with its standard error, and the
    best that any policy could have, where that is known. Without `after`: before alone, with its standard error."""
    start, bests = by_level(before, problems), by_level(best, problems)
    if after is not None:
        end = by_level(after, problems)
        change = by_level({name: after[name] - before[name] for name in columns}, problems)
    rows = [["level", *columns]]
    for level in start:
        rows.append([level])
        for name in columns:
            mean, error = start[level][name]
            cell = f"{mean:.3f} ± {error:.3f}"
            if after is not None:
                difference, error = change[level][name]
                cell = f"{mean:.3f} -> {end[level][name][0]:.3f} ({difference:+.3f} ± {error:.3f})"
            rows[-1].append(cell + (f" best {bests[level][name][0]:.3f}" if name in best else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:^{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def pyplot():
    """matplotlib.pyplot, drawing to files alone; imported when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value (S,) and its neighbours within a twentieth of all, fewer at the ends: (S,)."""
    reach = len(values) // 20
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


def save_figure(
    folder: Path, evaluations: list[tuple[int, dict]], steps: Sequence[dict], best: dict, names: Sequence[str], k: int
) -> None:
    """curves.png: each metric family against j before and after; and training, step by step, with the evaluations.

    evaluations: (step, result of `by_level`), the first before training and the last after it. steps: the records of
    training in metrics.jsonl. best: the best possible values of metrics, name -> (P,), where they are known. names:
    metric families, such as "pass" for pass@1, pass@2."""
    plt = pyplot()
    both = [("before", "tab:gray", evaluations[0][1]), ("after", "tab:blue", evaluations[-1][1])]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4.4 * (len(names) + 1), 4.2), layout="constrained")
    for axis, name in zip(axes, names):
        for label, colour, result in both:
            js = [int(key.partition("@")[2]) for key in result["all"] if key.startswith(f"{name}@")]
            mean, error = (np.array([result["all"][f"{name}@{j}"][i] for j in js]) for i in (0, 1))
            axis.plot(js, mean, marker="o", markersize=3, color=colour, label=label)
            axis.fill_between(js, mean - error, mean + error, color=colour, alpha=0.2)
        if f"{name}@1" in best:
            possible = [best[f"{name}@{j}"].mean().item() for j in js]
            axis.plot(js, possible, linestyle=":", color="black", label="best possible at each j")
        axis.set(xscale="log", xlabel="j", ylabel=f"{name}@j", title=f"{name}@j, held out (± standard error)")
        axis.set_xticks(js, map(str, js))
        axis.minorticks_off()
    # At one try all families are pass@1, whose mean over a step's samples is the reward.
    for i, name in enumerate(dict.fromkeys(["pass@1", *(f"{name}@{k}" for name in names if k > 1)])):
        logged = "reward" if name == "pass@1" else name
        at, values = np.array([(row["step"], row[logged]) for row in steps if logged in row]).reshape(-1, 2).T
        axes[-1].plot(at, values, color=f"C{i}", linewidth=0.5, alpha=0.4)
        axes[-1].plot(at, smoothed(values), color=f"C{i}", linewidth=1.2, label=f"{logged}, training")
        mean, error = zip(*(result["all"][name] for _, result in evaluations))
        at = [step for step, _ in evaluations]
        axes[-1].errorbar(at, mean, error, fmt="o", markersize=5, color=f"C{i}", mec="black", label=f"{name}, held out")
    axes[-1].set(xlabel="step", title="training")
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)  # below, where no data are
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def comparison(folders: Sequence[str]) -> str:
    """How runs changed their metrics, those that differ in nothing but the seed as mean ± standard error over seeds.

    Raises BadInput for a folder that is not a finished run."""
    groups: dict[str, list[tuple[dict, dict]]] = {}
    for folder in map(Path, folders):
        try:
            args = json.loads((folder / "args.json").read_text())
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"{folder} is not a run folder: {error}") from error
        evaluations = [record for record in log if "eval" in record]
        if len(evaluations) < 2 or evaluations[-1]["step"] < args["steps"]:
            raise BadInput(f"{folder} has not come to its end: leave it out")
        settings = {name: value for name, value in args.items() if name not in SEEDS_DIFFER_IN}
        first, last = (evaluations[i]["eval"]["all"] for i in (0, -1))
        groups.setdefault(json.dumps(settings), []).append((first, last))
    settings, lines = {key: json.loads(key) for key in groups}, []
    varying = [name for name in next(iter(settings.values())) if len({str(s.get(name)) for s in settings.values()}) > 1]
    for key, runs in groups.items():
        label = " ".join(f"{name}={settings[key].get(name)}" for name in varying) or settings[key]["script"]
        lines.append(f"{label}  ({len(runs)} seeds)")
        for metric in runs[0][1]:
            before, after = (np.array([run[i][metric][0] for run in runs]) for i in (0, 1))
            change = after - before  # (seeds,)
            error = change.std(ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
            lines.append(f"  {metric:8} {before.mean():.3f} -> {after.mean():.3f}  {change.mean():+.3f} ± {error:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(comparison(sys.argv[1:]) if sys.argv[1:] else "usage: python -m harness.report runs/a runs/b ...")
    except BadInput as mistake:
        sys.exit(f"error: {mistake}")
