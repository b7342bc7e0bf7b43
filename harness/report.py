"""Tables, figures and samples of a run. As a program it compares runs: their metrics before and after training, as
means over runs that differ only in the seed.

    python -m harness.report runs/a runs/b
    python -m harness.report runs/* --figure together.png
"""

import argparse
import glob
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from verifiers import BadInput, Problem

SEEDS_DIFFER_IN = ("seed", "run_name", "resume", "save_every", "show_samples", "tensorboard", "track")
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles for 1, 2, .. 9 d.o.f.


def mean_and_interval(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first dimension (seeds or problems) and half-width of its 95% confidence interval.

    values: (S, ...), an array or a tensor on the CPU. Returns two arrays (...) float64. The interval is Student's t. It
    is nan for S = 1; for S > 10 it is Abramowitz and Stegun 26.7.5, which is right to 4 digits."""
    values = np.asarray(values, dtype=float)
    v = len(values) - 1
    if v == 0:
        return values[0], math.nan * values[0]
    t = STUDENT_95[v - 1] if v < 10 else 1.95996 + 2.37227 / v + 2.82250 / v**2 + 2.55585 / v**3
    return values.mean(0), t * values.std(0, ddof=1) / math.sqrt(v + 1)


def by_level(problems: Sequence[Problem]) -> dict[str, torch.Tensor]:
    """Indices of all problems ("all") and, if there are several levels, of each level's ("1", "2", ...), int64."""
    levels = sorted({problem.level for problem in problems if problem.level is not None})
    levels = levels if len({problem.level for problem in problems}) > 1 else []
    places = {str(x): torch.tensor([i for i, p in enumerate(problems) if p.level == x]) for x in levels}
    return {"all": torch.arange(len(problems))} | places


def samples(problems: Sequence[Problem], responses: list[list[str]], rewards: torch.Tensor, count: int) -> list[dict]:
    """The first 4 responses to each of `count` problems, evenly spaced, with their rewards; rewards: (P, n)."""
    places = dict.fromkeys(place * len(problems) // count for place in range(count))
    columns = ([p.prompt for p in problems], [row[:4] for row in responses], rewards[:, :4].tolist())
    return [dict(zip(("prompt", "responses", "rewards"), row)) for i, row in enumerate(zip(*columns)) if i in places]


def number(value: float, half_width: float = math.nan, sign: str = "") -> str:
    """ "0.123 ± 0.045", or "0.123" where the interval is nan; sign: "+" for changes. It is never "-0.000"."""
    text = f"{round(float(value), 3) + 0.0:{sign}.3f}"
    return text if math.isnan(half_width) else f"{text} ± {half_width:.3f}"


HEADS = {1: ["mean ± 95%"], 2: ["before -> after", "change ± 95%"]}  # of what `cells` returns


def cells(before, after=None) -> list[str]:
    """Values (S,) of problems or seeds: means before and after, paired change ± 95%; without `after` the mean ± 95%."""
    if after is None:
        return [number(*mean_and_interval(before))]
    return [f"{number(before.mean())} -> {number(after.mean())}", number(*mean_and_interval(after - before), "+")]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows' cells, with each column as wide as its widest cell. Rows may end early."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def final_table(
    before: dict, after: dict | None, best: dict, problems: list, columns: Sequence[str], split: str
) -> str:
    """The table of a run: one row for each level and each metric of `columns`. before, after, best: values of each
    problem, name -> (P,); best is the best that any policy could have. split: "held-out" or "TRAINING"."""
    rows = [["level", "metric", *HEADS[1 if after is None else 2], *(["best possible"] if best else [])]]
    for (level, at), name in itertools.product(by_level(problems).items(), columns):
        possible = [number(best[name][at].mean())] if name in best else []
        rows.append([level, name, *cells(before[name][at], after and after[name][at]), *possible])
    return f"{len(problems)} {split} problems; ± is a 95% interval over problems (Student's t)\n{table(rows)}"


def pyplot():
    """matplotlib.pyplot, drawing to files alone; imported when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_and_close(figure, path: Path) -> None:
    """Write a figure, in the format that the path's suffix names. Raises BadInput for a suffix that names none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise BadInput(f"cannot draw {path}: {error}") from error
    pyplot().close(figure)


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """The records of a run's metrics.jsonl: of its evaluations, and of its training steps."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in log if "eval" in record], [record for record in log if "eval" not in record]


def smoothed(steps: Sequence[dict], name: str) -> tuple[list[int], np.ndarray]:
    """The steps that logged `name`, and a running mean of it over a twentieth of the steps (fewer at the ends)."""
    values = np.array([record[name] for record in steps if name in record])
    ones, window = np.ones(len(values)), np.ones(max(1, len(values) // 20))
    means = np.convolve(values, window, "same") / np.convolve(ones, window, "same") if len(values) else values
    return [record["step"] for record in steps if name in record], means


def save_figure(folder: Path, best: dict, names: Sequence[str], k: int, split: str) -> None:
    """curves.png, from the run's log. Left: each metric family against j, before and after, 95% bands over problems.
    Right: along training, the evaluations as points and the steps as a thin smoothed line.

    best: the best possible values, name -> (P,), where they are known. names: metric families, such as "pass" for
    pass@1, pass@2. split: "held-out" or "TRAINING"."""
    plt, (evaluations, steps) = pyplot(), read_log(folder)
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4.2 * (len(names) + 1), 4.2), layout="constrained")
    ends = {"before": ("tab:gray", evaluations[0])} | ({"after": ("tab:blue", evaluations[-1])} if steps else {})
    for axis, name in zip(axes, names):
        for label, (colour, record) in ends.items():
            of_name = {key: value for key, value in record["eval"]["all"].items() if key.startswith(f"{name}@")}
            js, (mean, half) = [int(key.partition("@")[2]) for key in of_name], np.array([*of_name.values()], float).T
            axis.plot(js, mean, marker="o", markersize=3, color=colour, label=label)
            axis.fill_between(js, mean - half, mean + half, color=colour, alpha=0.2)
        if f"{name}@1" in best:
            possible = [best[f"{name}@{j}"].mean().item() for j in js]
            axis.plot(js, possible, linestyle=":", color="black", label="best possible at each j")
        axis.set(xscale="log", xlabel="j", ylabel=f"{name}@j", title=f"{name}@j, {split} (± 95%)")
        axis.set_xticks(js, map(str, js))
        axis.minorticks_off()
    for i, name in enumerate(["pass@1", *(f"{name}@{k}" for name in names if k > 1)]):  # bon@1 is pass@1
        mean, half = np.array([record["eval"]["all"][name] for record in evaluations], float).T
        at, logged = [record["step"] for record in evaluations], "reward" if i == 0 else name
        axes[-1].errorbar(at, mean, half, fmt="o", markersize=3, color=f"C{i}", label=f"{name}, {split}")
        if (line := smoothed(steps, logged))[0]:
            axes[-1].plot(*line, linewidth=0.8, color=f"C{i}", label=f"{logged} of the steps, smoothed")
    axes[-1].set(xlabel="step", title="along training")
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize="small")
    save_and_close(figure, folder / "curves.png")


def finished_runs(patterns: Sequence[str]) -> dict[str, list[tuple[dict, list[dict], list[dict]]]]:
    """Arguments, evaluations and steps of the runs of each setting (all flags but the seed), by the flags that differ,
    such as "estimator=mean k=4". Prints which folders are left out, and why. Raises BadInput if nothing is left."""
    groups: dict[str, list] = {}
    for folder in (Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)) or [pattern]):
        try:
            if not (folder / "args.json").is_file():
                raise ValueError("it is no run folder")
            args, (evaluations, steps) = json.loads((folder / "args.json").read_text()), read_log(folder)
            if not evaluations or evaluations[-1]["step"] < args["steps"]:
                raise ValueError("it has not come to its end")
            settings = {name: x for name, x in args.items() if name not in SEEDS_DIFFER_IN and x is not None}
            group = groups.setdefault(json.dumps(settings, sort_keys=True), [])
            if args["seed"] in (other["seed"] for other, *_ in group):
                raise ValueError("it counts once, for a run before it has the same arguments and seed")
            group.append((args | {"folder": str(folder)}, evaluations, steps))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"left out {folder}: {error}")
    if not groups:
        raise BadInput("no finished run is there: give folders of some, such as runs/*")
    every = [json.loads(key) for key in groups]
    names = [name for name in sorted({*itertools.chain(*every)}) if len({str(x.get(name)) for x in every}) > 1]
    labels = [" ".join(f"{name}={x[name]}" for name in names if name in x) or x["script"] for x in every]
    return dict(zip(labels, groups.values()))


def comparison(runs: dict) -> str:
    """The metrics of each setting of `finished_runs`, before and after training, as means over seeds."""
    parts = ["mean over seeds of the evaluations; ± is a 95% interval over seeds (Student's t)"]
    for label, group in runs.items():
        title = f"{label} ({len(group)} seed{'s' * (len(group) > 1)}: {' '.join(args['folder'] for args, *_ in group)})"
        parts.append(textwrap.fill(title, 80, subsequent_indent="  ", break_on_hyphens=False))
        ends = [[log[i]["eval"]["all"] for _, log, _ in group] for i in (0, -1)[: len(group[0][1])]]  # 1 for --steps 0
        rows = [[name, *cells(*(np.array([x[name][0] for x in end]) for end in ends))] for name in ends[0][0]]
        parts.append(textwrap.indent(table([["metric", *HEADS[len(ends)]], *rows]), "  "))
    return "\n".join(parts)


def save_comparison(path: Path, runs: dict, metric: str) -> None:
    """Draw the metric of all settings of `finished_runs`, one colour each: against steps and, if steps logged it,
    against the smoothed KL; means over seeds with 95% bands. Raises BadInput if a run lacks the metric."""
    labels = ["step", "KL to the reference (nats), of runs that log it"]
    labels = labels[: 1 + any("kl" in step for group in runs.values() for *_, steps in group for step in steps)]
    options = {"figsize": (5 * len(labels), 4.2), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, ((*axes,),) = pyplot().subplots(1, len(labels), **options)
    for label, group in runs.items():
        if metric not in (there := group[0][1][0]["eval"]["all"]):
            raise BadInput(f"--metric {metric} is none of {label}: it has {', '.join(there)}")
        logs = [{x["step"]: x["eval"]["all"][metric][0] for x in evaluations} for _, evaluations, _ in group]
        at = np.array(sorted(set.intersection(*map(set, logs))))  # (E,)
        mean, half = mean_and_interval([[log[step] for step in at] for log in logs])  # (E,)
        kls = [smoothed(steps, "kl") for _, _, steps in group]  # step t logs the KL of the policy after t - 1
        kl = [np.interp(at + 1, *x) if x[0] else at * np.nan for x in kls]  # S of (E,)
        for axis, x in zip(axes, (at, np.mean(kl, 0))):
            axis.plot(x, mean, marker="o", markersize=3, label=label)
            axis.fill_between(x, mean - half, mean + half, alpha=0.2)
    for axis, label in zip(axes, labels):
        axis.set(xlabel=label)
    axes[0].set(ylabel=metric, title="mean over seeds (± 95%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize="small")
    save_and_close(figure, path)


def compare(patterns: Sequence[str], figure: Path | None = None, metric: str | None = None) -> None:
    """Print how runs compare, and draw them together if a figure is asked for. Raises BadInput."""
    runs = finished_runs(patterns)
    print(comparison(runs))
    if figure:
        (first, *_), *_ = next(iter(runs.values()))
        save_comparison(figure, runs, metric or f"pass@{first.get('k', first.get('N'))}")
        print(f"figure: {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="folders of runs; what is no finished run is left out")
    parser.add_argument("--figure", type=Path, help="also draw the runs together into this file, such as together.png")
    parser.add_argument("--metric", help="what is drawn (default: pass@k, by the k or N of the first run)")
    args = parser.parse_args()
    try:
        compare(args.runs, args.figure, args.metric)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
