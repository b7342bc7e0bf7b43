"""pass@1 against pass@k on `suspects`: the exact frontier, which no policy lies above, and where trained policies lie.

A policy is a point; the frontier comes from maximising w pass@1 + (1 - w) pass@k for each w. An objective's own optimum
may lie below it: the optimum for k = 16 spends on tries that pass@8 does not count. reproduce.py and real_model.py draw
their policies on it.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure  # first: puts the repository on the path
import numpy as np
import optima

from harness.report import mean_and_interval, pyplot, save_and_close
from verifiers.suspects import best_policy

KS = (8, 32)  # the panels


@functools.cache
def curve(k: int) -> np.ndarray:
    """pass@1 and pass@k of the frontier from the best for k tries to the best for one: (101, 2)."""
    q, weights, _ = optima.held_out()
    return optima.frontier(q, weights, k).numpy()


def below_frontier(curve: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How much more pass@k the frontier has at a point's pass@1: (S,), 0 on it.

    curve: (G, 2) of `optima.frontier`; points: (S, 2), (pass@1, pass@k). Left of the best for k, where pass@1 costs
    nothing, it is the distance to that best.
    """
    return np.interp(points[:, 0], curve[:, 0], curve[:, 1]) - points[:, 1]


def draw(axis, k: int, measured: Mapping[str, np.ndarray]) -> list[tuple]:
    """pass@1 against pass@k: frontier, optima for k = 1 to 32, and measured means with 95% intervals over seeds.

    measured: name -> (S, 3), pass@1, pass@8 and pass@32 of each of S seeds, up to 10. Names that agree up to a comma
    ("unbiased, k = 2", "unbiased, k = 4") have one colour and are joined by a line. Returns what `measure.label` takes.
    """
    column = 1 + KS.index(k)
    x, y = np.vstack([[0, curve(k)[0, 1]], curve(k)]).T  # (G + 1,) each: from the left edge on
    axis.set_facecolor("0.93")  # where no policy is
    axis.fill_between(x, y, color="white")
    axis.plot(x, y, color="black", linewidth=1, label="frontier: no policy beyond")
    q, weights, _ = optima.held_out()
    best = [best_policy(q, tries) for tries in optima.TRIES]
    stars = np.array([[(weights @ optima.pass_at_k(q, pi, j)).item() for j in (1, k)] for pi in best])  # (6, 2)
    axis.plot(*stars.T, "*", color="black", markersize=8, label="the best for k tries")
    labels = [(star, f"k = {tries}", "black") for tries, star in zip(optima.TRIES, stars)]
    families = {name: name.partition(",")[0] for name in measured}
    for family in dict.fromkeys(families.values()):
        colour, names = measure.COLOURS[family], [name for name in measured if families[name] == family]
        seeds = [np.asarray(measured[name])[:, [0, column]] for name in names]  # (S, 2) each
        pairs = np.array([mean_and_interval(x) for x in seeds])  # (names, 2, 2): mean and half-width, of x and of y
        (x, dx), (y, dy) = np.nan_to_num(pairs).transpose(2, 1, 0)
        axis.errorbar(x, y, dy, dx, "o-", color=colour, ms=5, linewidth=1, label=family)
        labels += [((a, b), name.partition(", ")[2] or name, colour) for a, b, name in zip(x, y, names)]
    axis.set(xlabel="pass@1", ylabel=f"pass@{k}", xlim=(0.2, 0.68))
    return labels


def save_figure(path: Path, panels: Sequence[tuple[str, int, Mapping[str, np.ndarray]]], low: float = 0.62) -> None:
    """A panel for each (title, k, measured) of `draw`; pass@k from `low` up."""
    size = 5.4 * len(panels) + 2.2, 5.2
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    found, entries = [], {}
    for axis, (title, k, measured) in zip(axes[0], panels):
        found.append(draw(axis, k, measured))
        axis.set(title=title, ylim=(low, 1.01))
        entries |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries, loc="outside right center", fontsize=9)
    figure.canvas.draw()  # the layout stands from here on
    for axis, labels in zip(axes[0], found):
        measure.label(axis, labels)
    save_and_close(figure, path)
