"""pass@1 against pass@k on `lines`: the exact frontier, which no policy lies above, and where trained policies lie.

    python benchmarks/frontier.py                               # the frontier and the optima alone
    python benchmarks/frontier.py --measured measured.json      # {"name": [[pass@1, pass@8, pass@32] of each seed]}

A policy is a point; the frontier comes from maximising w pass@1 + (1 - w) pass@k for each w. An objective's own optimum
may lie below it, as that for k = 16 does in (pass@1, pass@8): it spends on tries that pass@8 does not count.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import measure  # first: puts the repository on the path
import numpy as np
import optima
import tyro

from harness.report import pyplot
from verifiers.lines import best_policy

KS = (8, 32)  # the panels
MARKED = (1, 2, 4, 8, 16, 32)


@dataclass
class Args:
    measured: Path | None = None
    """JSON of measured points: a name, and [pass@1, pass@8, pass@32] of each of 2 to 10 seeds"""
    figure: Path = Path("runs/frontier.png")
    """where the figure goes"""


def below_frontier(curve: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How much more pass@k the frontier has at a point's pass@1: (S,), 0 on it.

    curve: (G, 2) of `optima.frontier`; points: (S, 2), (pass@1, pass@k). Left of the best for k, where pass@1 costs
    nothing, it is the distance to that best.
    """
    return np.interp(points[:, 0], curve[:, 0], curve[:, 1]) - points[:, 1]


def optimum(k: int) -> np.ndarray:
    """(pass@1, pass@8, pass@32) of the best policy for k tries: (3,)."""
    q, weights, _ = optima.held_out_kinds()
    return np.array([(weights @ optima.pass_at_k(q, best_policy(q, k), j)).item() for j in (1, *KS)])


def save_figure(path: Path, curves: Mapping[int, np.ndarray], measured: Mapping[str, np.ndarray]) -> None:
    """A panel for pass@8 and one for pass@32: frontier, optima for k = 1 to 32, measured means with 95% intervals.

    curves: k of the panel -> (G, 2) of `optima.frontier`. measured: name -> (S, 3), pass@1, pass@8 and pass@32 of each
    of S seeds, 2 to 10. Names that agree up to a comma ("unbiased, k = 2", "unbiased, k = 4") are joined by a line, and
    each point has its number beside it.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(KS), figsize=(14, 5.2), layout="constrained")
    families = {name: name.partition(",")[0] for name in measured}
    colours = {family: f"C{i}" for i, family in enumerate(dict.fromkeys(families.values()))}
    for column, (axis, k) in enumerate(zip(axes, KS), start=1):
        x, y = np.vstack([[0, curves[k][0, 1]], curves[k]]).T  # (G + 1,) each: from the left edge on
        axis.set_facecolor("0.93")  # where no policy is
        axis.fill_between(x, y, color="white")
        axis.plot(x, y, color="black", linewidth=1, label="frontier: no policy beyond")
        stars = np.array([optimum(tries)[[0, column]] for tries in MARKED])  # (6, 2)
        axis.plot(*stars.T, "*", color="black", markersize=8, label="best for 1, 2, 4, 8, 16, 32 tries")
        for tries, star in zip(MARKED, stars):
            axis.annotate(tries, star, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        for family, colour in colours.items():
            names = [name for name in measured if families[name] == family]
            means, errors = zip(*(measure.interval(np.asarray(measured[name])[:, [0, column]]) for name in names))
            (x, y), (dx, dy) = np.transpose(means), np.transpose(errors)  # (names,) each
            line = "-" if len(names) > 1 else ""
            above = 2 if line else 3  # single points, which other families may cover
            axis.errorbar(x, y, dy, dx, f"o{line}", color=colour, ms=5, linewidth=1, label=family, zorder=above)
            for name, mean in zip(names, means) if line else ():
                number = name.rpartition(" ")[2]
                axis.annotate(number, mean, xytext=(-7, -10), textcoords="offset points", color=colour, fontsize=8)
        axis.set(
            xlabel="pass@1", ylabel=f"pass@{k}", title=f"one try against {k}", xlim=(0.28, 0.75), ylim=(0.69, 1.01)
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    measured = json.loads(args.measured.read_text()) if args.measured else {}
    measured = {name: np.array(seeds, dtype=float) for name, seeds in measured.items()}
    q, weights, _ = optima.held_out_kinds()
    curves = {k: optima.frontier(q, weights, k).numpy() for k in KS}
    save_figure(args.figure, curves, measured)
    rows = []
    for name, seeds in {**{f"best for {k}": optimum(k)[None] for k in MARKED}, **measured}.items():
        columns = [*seeds.T, *(below_frontier(curves[k], seeds[:, [0, i]]) for i, k in enumerate(KS, start=1))]
        if len(seeds) == 1:  # exact
            rows.append([name, *(f"{column[0]:.3f}" for column in columns)])
        else:
            rows.append([name, *("{:.3f} ± {:.3f}".format(*measure.interval(column)) for column in columns)])
    head = ["", "pass@1", *(f"pass@{k}" for k in KS), *(f"below the frontier of pass@{k}" for k in KS)]
    measure.print_table(head, rows)
    print(args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
