"""harness/report.py: means with their intervals, tables that fit 80 columns, figures, and runs compared."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import in_process

import harness.report as report
from harness.report import save_figure
from verifiers import BadInput, Problem


@pytest.mark.parametrize("S, t", [(2, 12.706), (5, 2.776), (10, 2.262), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_the_interval_is_students_whatever_the_number_of_values(S, t):
    """Values 0 and 2 in turn have the mean m = 2 (S // 2) / S and the sum of squared deviations S m (2 - m)."""
    values = [2.0 * (i % 2) for i in range(S)]
    m = 2 * (S // 2) / S
    expected = t * math.sqrt(S * m * (2 - m) / (S - 1)) / math.sqrt(S)
    mean, half = report.mean_and_interval(torch.tensor(values, dtype=torch.float32))
    assert mean == pytest.approx(m) and half == pytest.approx(expected, rel=1e-4)
    mean, half = report.mean_and_interval(np.array([values, np.negative(values)]).T)  # (S, 2)
    assert mean == pytest.approx([m, -m]) and half == pytest.approx([expected] * 2, rel=1e-4)


def test_one_value_has_no_interval_and_there_is_no_minus_zero():
    mean, half = report.mean_and_interval(torch.tensor([0.25]))
    assert mean == 0.25 and math.isnan(half)
    assert report.cells(torch.tensor([0.25])) == ["0.250"]
    assert report.cells(np.array([0.25]), np.array([0.5])) == ["0.250 -> 0.500", "+0.250"]
    assert report.number(-0.0004) == "0.000" and report.number(torch.tensor(-0.0004), 0.0012, "+") == "+0.000 ± 0.001"
    assert report.number(-0.0006, 0.5, "+") == "-0.001 ± 0.500"


PROBLEMS = [Problem("a", "1", level=2), Problem("b", "1", level=10), Problem("c", "1", level=2)]
BEFORE = {"pass@1": torch.tensor([0.0, 0.5, 0.25]), "bon@16": torch.tensor([0.0, 1.0, 0.5])}
AFTER = {"pass@1": torch.tensor([0.5, 0.5, 0.25]), "bon@16": torch.tensor([0.0, 1.0, 0.25])}
BEST = {"pass@1": torch.tensor([1.0, 0.5, 0.5])}


def test_the_last_table_has_paired_changes_with_intervals_over_problems():
    """Changes of pass@1: .5, 0, 0, deviation .2887, half-width 4.303 x .2887 / sqrt(3) = .717; of level 2's two .5 and
    0: deviation .3536, 12.706 x .3536 / sqrt(2) = 3.1765. Of bon@16: 0, 0, -.25, half as much."""
    lines = report.final_table(BEFORE, AFTER, BEST, PROBLEMS, ["pass@1", "bon@16"], "held-out").splitlines()
    assert lines == [
        "3 held-out problems; ± is a 95% interval over problems (Student's t)",
        "level  metric  before -> after  change ± 95%    best possible",
        "all    pass@1  0.250 -> 0.417   +0.167 ± 0.717  0.667",
        "all    bon@16  0.500 -> 0.417   -0.083 ± 0.359",
        "2      pass@1  0.125 -> 0.375   +0.250 ± 3.176  0.750",
        "2      bon@16  0.250 -> 0.125   -0.125 ± 1.588",
        "10     pass@1  0.500 -> 0.500   +0.000          0.500",
        "10     bon@16  1.000 -> 1.000   +0.000",
    ]
    assert max(map(len, lines)) <= 80
    lines = report.final_table(BEFORE, None, {}, PROBLEMS[:1] * 3, ["pass@1"], "TRAINING").splitlines()
    assert lines[0].startswith("3 TRAINING problems; ")
    assert lines[1:3] == ["level  metric  mean ± 95%", "all    pass@1  0.250 ± 0.621"]  # 4.303 x .25 / sqrt(3)


def test_samples_are_a_bounded_part_of_the_responses_evenly_spaced():
    """Of 120 problems 50; of 6 responses to each the first 4."""
    problems, rewards = [Problem(str(i), "") for i in range(120)], torch.arange(720).view(120, 6)
    found = report.samples(problems, [[f"{i}.{j}" for j in range(6)] for i in range(120)], rewards, 50)
    assert [record["prompt"] for record in found[:6]] == ["0", "2", "4", "7", "9", "12"]
    assert len(found) == 50
    assert found[3] == {"prompt": "7", "responses": ["7.0", "7.1", "7.2", "7.3"], "rewards": [42, 43, 44, 45]}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, open."""
    saved = []
    monkeypatch.setattr(report, "save_and_close", lambda figure, path: saved.append(figure))
    yield saved
    for figure in saved:
        report.pyplot().close(figure)


def lines_of(axis) -> dict[str, tuple[list, list]]:
    """Label -> x and y of what is drawn on an axis, points with error bars as well."""
    drawn = {line.get_label(): line for line in axis.lines}
    drawn |= {container.get_label(): container.lines[0] for container in axis.containers}
    named = {label: line for label, line in drawn.items() if label != "_nolegend_"}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in named.items()}


def write_run(folder: Path, args: dict, evaluations: dict[int, dict], steps: dict[int, dict]) -> Path:
    """A run's args.json and metrics.jsonl; evaluations: step -> metric -> mean, which all have the half-width 0.1."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": "pass_at_k_pg", "seed": 0, "k": 2} | args))
    log = [{"step": step, **record} for step, record in steps.items()]
    for step, means in evaluations.items():
        log.append({"step": step, "eval": {"all": {name: [mean, 0.1] for name, mean in means.items()}}})
    log.sort(key=lambda record: record["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def test_curves_show_what_every_step_logged_with_the_evaluations_on_it(figures, tmp_path):
    """Of 60 steps, three around each are averaged: step t logs t / 100, so that only the two ends move, to the mean of
    two: 1.5 and 59.5 hundredths."""
    steps = {t: {"reward": t / 100, "bon@2": 0.5} for t in range(1, 61)}
    names = ("pass@1", "pass@2", "bon@1", "bon@2")
    evaluations = {t: {name: t / 100 + i / 10 for i, name in enumerate(names)} for t in (0, 40, 60)}
    folder = write_run(tmp_path / "run", {}, evaluations, steps)
    best = {f"pass@{j}": torch.tensor([0.5, 1.0]) for j in (1, 2)}
    save_figure(folder, best, ["pass", "bon"], 2, "TRAINING")
    passes, bons, training = figures[0].axes
    assert passes.get_title() == "pass@j, TRAINING (± 95%)" and bons.get_title() == "bon@j, TRAINING (± 95%)"
    possible = {"best possible at each j": ([1, 2], [0.75, 0.75])}
    assert lines_of(passes) == {"before": ([1, 2], [0.0, 0.1]), "after": ([1, 2], [0.6, 0.7])} | possible
    band = passes.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.5, 0.8))
    drawn = lines_of(training)
    at, rewards = drawn["reward of the steps, smoothed"]
    assert at == [*range(1, 61)] and rewards[:2] + rewards[-1:] == pytest.approx([0.015, 0.02, 0.595])
    assert drawn["bon@2 of the steps, smoothed"][1] == pytest.approx([0.5] * 60) and len(drawn) == 5
    assert drawn["pass@2, TRAINING"] == ([0, 40, 60], pytest.approx([0.1, 0.5, 0.7]))
    figures[0].canvas.draw()
    for axis in figures[0].axes:  # no legend lies on data
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())
    save_figure(write_run(tmp_path / "alone", {}, {0: {"pass@1": 0.5, "pass@2": 0.75}}, {}), {}, ["pass"], 1, "x")
    assert lines_of(figures[1].axes[0]) == {"before": ([1, 2], [0.5, 0.75])}  # an evaluation has no "after"
    assert [points.get_label() for points in figures[1].axes[1].containers] == ["pass@1, x"]  # with k = 1 once


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of two settings, and what is beside them."""
    monkeypatch.chdir(tmp_path)
    steps = {t: {"kl": (t - 1) / 10} for t in range(1, 5)}
    of_both = [("unbiased", 0, (0.25, 0.5)), ("unbiased", 1, (0.25, 0.7)), ("mean", 0, (0.5, 0.4997))]
    for estimator, seed, ends in of_both:
        args = {"estimator": estimator, "seed": seed, "steps": 4, "run_name": f"{seed}", "k": 2}
        log = {step: {"pass@2": mean} for step, mean in zip((0, 2, 4), (ends[0], 0.5, ends[1]))}
        write_run(Path("runs") / f"{estimator}{seed}", args, log, steps if estimator == "unbiased" else {})
    return report


def test_runs_are_compared_over_seeds(runs, capsys):
    """Changes .25 and .45: mean .35, deviation .1414, half-width 12.706 x .1414 / sqrt(2) = 1.271."""
    runs.compare(("runs/*",))
    assert capsys.readouterr().out.splitlines() == [
        "mean over seeds of the evaluations; ± is a 95% interval over seeds (Student's t)",
        "estimator=mean (1 seed: runs/mean0)",
        "  metric  before -> after  change ± 95%",
        "  pass@2  0.500 -> 0.500   +0.000",
        "estimator=unbiased (2 seeds: runs/unbiased0 runs/unbiased1)",
        "  metric  before -> after  change ± 95%",
        "  pass@2  0.250 -> 0.600   +0.350 ± 1.271",
    ]


def test_a_seed_counts_once_and_what_is_no_finished_run_is_left_out(runs, capsys):
    same = {"estimator": "unbiased", "seed": 1, "steps": 4, "run_name": "again", "estimator_sha256": None}
    for name, steps in (("v", 4), ("w", 5)):
        write_run(Path("runs") / name, same | {"steps": steps}, {0: {"pass@2": 0.9}, 4: {"pass@2": 0.1}}, {})
    Path("runs/bandit.png").write_text("")
    Path("runs/x").mkdir()
    Path("runs/x/args.json").write_text("{")
    runs.compare(("runs/unbiased?", "runs/[vwxb]*", "runs/nothing", "runs/unbiased0"))
    none, once = "it is no run folder", "it counts once, for a run before it has the same arguments and seed"
    reasons = {"bandit.png": none, "v": once, "w": "it has not come to its end", "x": "Expecting property name",
               "nothing": none, "unbiased0": once}  # fmt: skip
    *left_out, title, _, row = capsys.readouterr().out.splitlines()
    assert len(left_out) == 7  # and the line that says what ± is
    assert all(line.startswith(f"left out runs/{x}: {why}") for line, (x, why) in zip(left_out, reasons.items()))
    assert title == "pass_at_k_pg (2 seeds: runs/unbiased0 runs/unbiased1)"
    assert row == "  pass@2  0.250 -> 0.600   +0.350 ± 1.271"
    ended = in_process("harness/report.py", "runs/nothing", code=2)
    assert ended.stdout == "left out runs/nothing: it is no run folder\n"
    assert ended.stderr == "error: no finished run is there: give folders of some, such as runs/*\n"
    assert {"--figure", "--metric"} <= {*in_process("harness/report.py", "--help").stdout.split()}


def test_runs_that_only_evaluate_are_compared(runs, capsys):
    for seed, model in enumerate(("a", "b", "b")):
        write_run(Path(f"runs/e{seed}"), {"model": model, "steps": 0, "seed": seed}, {0: {"pass@1": seed / 10}}, {})
    runs.compare(("runs/e*",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == ["model=a (1 seed: runs/e0)", "  metric  mean ± 95%", "  pass@1  0.000"]
    assert lines[4:6] == ["model=b (2 seeds: runs/e1 runs/e2)", "  metric  mean ± 95%"]
    assert lines[6:] == ["  pass@1  0.150 ± 0.635"]  # 12.706 x .05
    for lr in (1, 2):  # long labels are wrapped
        args = {f"flag_{i}": "x" * 20 + str(lr) for i in range(5)} | {"steps": 0}
        write_run(Path(f"runs/long{lr}"), args, {0: {"metric@32": 1.0}}, {})
    runs.compare(("runs/long*",))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_runs_are_drawn_against_steps_and_kl(runs, figures, capsys):
    """Step t logs the KL after t - 1 steps, (t - 1) / 10; none is logged after the last, whose KL is the one before."""
    runs.compare(("runs/*",), Path("t.png"))
    steps, kl = figures[0].axes
    assert "figure: t.png" in capsys.readouterr().out and steps.get_ylabel() == "pass@2"
    means = {"estimator=mean": [0.5, 0.5, 0.4997], "estimator=unbiased": [0.25, 0.5, 0.6]}
    assert lines_of(steps) == {label: ([0, 2, 4], pytest.approx(y)) for label, y in means.items()}
    at, y = lines_of(kl)["estimator=unbiased"]
    assert at == pytest.approx([0, 0.2, 0.3]) and y == pytest.approx([0.25, 0.5, 0.6])
    assert np.isnan(lines_of(kl)["estimator=mean"][0]).all()
    band = steps.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.6 - 1.2706, 0.6 + 1.2706), abs=1e-4)
    assert steps.lines[0].get_color() == kl.lines[0].get_color() != steps.lines[1].get_color()
    runs.compare(("runs/mean*",), Path("t.png"))  # where no step logs a KL, there is no panel for it
    assert [axis.get_xlabel() for axis in figures[1].axes] == ["step"]
    args = {"estimator": "unbiased", "seed": 2, "steps": 4, "k": 2}  # a seed that was evaluated more often
    write_run(Path("runs/unbiased2"), args, {step: {"pass@2": 0.5} for step in (0, 1, 2, 4)}, {1: {"kl": 0.0}})
    runs.compare(("runs/unbiased*",), Path("t.png"))
    assert lines_of(figures[-1].axes[0])["pass_at_k_pg"][0] == [0, 2, 4]  # is drawn where all were


def test_a_figure_that_cannot_be_drawn_is_one_line(runs):
    with pytest.raises(BadInput, match="--metric maj@2 is none of estimator=mean: it has pass@2"):
        runs.compare(("runs/*",), Path("t.png"), "maj@2")
    with pytest.raises(BadInput, match="cannot draw t.foo: Format 'foo' is not supported"):
        runs.compare(("runs/*",), Path("t.foo"), "pass@2")
