"""benchmarks/reproduce.py: statistics, tables, and small runs, stopped and taken up again. baselines.py: its table."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import tyro
from runs import ROOT, idle_flags

import harness.policy
from harness.report import mean_and_interval
from verifiers.suspects import candidates

sys.path.insert(0, str(ROOT / "benchmarks"))
reproduce, claims, baselines = map(importlib.import_module, ("reproduce", "claims", "baselines"))
measure = reproduce.measure
PREDICTIONS = json.loads(reproduce.optima.PREDICTIONS.read_text())


def test_the_interval_and_the_verdict():
    """For 1 .. 5: mean 3, deviation sqrt(2.5), half-width 2.776 sqrt(2.5 / 5) = 1.963 (any table of t)."""
    values = np.arange(1.0, 6.0)
    assert reproduce.measure.interval(values) == "3.000 ± 1.963" and reproduce.measure.interval([0.5]) == "0.500"
    assert reproduce.measure.interval(values, "+.1f") == "+3.0 ± 2.0"
    assert [reproduce.verdict(x, 1.963) for x in (3, -3, 1, -1)] == ["holds", "does not", *["not decidable"] * 2]


def test_every_run_is_a_command_that_its_script_takes_and_varies_with_the_seed():
    for name in ("base", *reproduce.RUNS, *reproduce.ON_PROGRAMS):
        script, *flags = reproduce.command(name, 3).split()
        args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
        assert (args.model, args.seed) == ("tiny-3", 3) and not idle_flags(args), name
        if name in reproduce.RUNS:
            samples = args.prompts_per_step * (getattr(args, "n", None) or max(getattr(args, "k", 0), 16))
            assert args.steps == (50 if name.endswith("-50") else 150) and 256 <= samples <= 264, name
    assert set(reproduce.QUICK) <= set(reproduce.RUNS) and set(reproduce.POLICIES) <= {"base", *reproduce.RUNS}


def test_every_comparison_is_predicted_and_is_about_runs_that_are_made():
    class Recorder(reproduce.Seed):
        def at(self, name, metric, levels=(), where="held-out"):
            assert name in {"base", *reproduce.RUNS, *reproduce.ON_PROGRAMS}
            self.read.append(name)
            return 0.0

    seed = Recorder(None, 0)
    for claim, _, value in claims.claims():
        assert value(seed) == 0 and claim in claims.PAPERS and claim in claims.PAGES
    points = {*reproduce.POLICIES} | {"learned-mean", "mean-50", "k8-50"}
    assert set(seed.read) | points == {"base", *reproduce.RUNS, *reproduce.ON_PROGRAMS}
    compared = [(claim, what) for claim, what, _ in claims.claims()]
    predicted = [(row["claim"], row["what"]) for row in PREDICTIONS["claims"] if row["claim"][0] != "B"]
    assert compared == predicted and len(set(compared)) == len(compared)


def test_votes_at_equal_kl_are_compared_by_their_distance_to_the_frontier():
    """Mean training is .01 under the frontier at KL .1 and .03 at .3, majority .005 under it at KL .2: .015 ahead."""
    best = {0.1: 0.5, 0.2: 0.6, 0.3: 0.65, 0.4: 0.66}
    places = {"vote-mean-0.8": (0.1, 0.01), "vote-mean-0.5": (0.3, 0.03), "vote-mean-0.3": (0.4, 0.03),
              "vote-biased-0.5": (0.2, 0.005)}  # fmt: skip

    class Known(reproduce.Seed):
        def at(self, name, metric, levels=(), where="held-out"):
            kl, distance = places[name]
            return {"kl": kl, reproduce.BEST_MEAN: best[kl], "maj@8": best[kl] - distance}[metric]

    assert Known(None, 0).votes_at_equal_kl(0.5) == pytest.approx(0.015)


def test_levels_are_means_by_the_weights_of_their_prompts():
    problems = reproduce.prompts("held-out")
    weights = reproduce.optima.level_weights(problems)
    values = torch.arange(len(problems)).double()
    found = reproduce.exact.by_level({"x": values}, problems)["x"]
    assert found["all"] == pytest.approx((weights @ values).item())
    some = [i for i, problem in enumerate(problems) if problem.level == 7]
    assert found["7"] == pytest.approx((weights[some] @ values[some] / weights[some].sum()).item())
    assert found["all"] == pytest.approx(sum(found[str(level)] for level in range(2, 9)) / 7)  # levels weigh alike


def test_best_of_n_by_a_verifier_tends_to_its_exact_value(monkeypatch, tmp_path):
    """With scores q, and below them what is not listed; and with scores that like best what is not listed."""
    problems = [problem for problem in reproduce.prompts("held-out") if problem.level in (2, 4)][::4]
    texts = [problem.prompt for problem in problems]
    groups = [candidates(problem) for problem in problems]
    task = dataclasses.replace(reproduce.the_task(), train=[], warm_start_problems=groups)
    task.warm_start = {"steps": 40, "batch": 8, "lr": 5e-3}
    policy, q = harness.policy.warm_start(task), dict(zip(texts, reproduce.posterior(texts).tolist()))
    (tmp_path / "tiny-verifier-lr-p2000-t8").mkdir()

    class Verifier:
        def __init__(self, elsewhere: float):
            self.elsewhere = elsewhere

        def score(self, prompts, responses):
            known = [dict(zip(reproduce.listed(x), q[x])) for x in prompts]
            return torch.tensor([[scores.get(y, self.elsewhere) for y in row] for scores, row in zip(known, responses)])

    monkeypatch.setattr(reproduce, "prompts", lambda where: problems)
    monkeypatch.setattr(reproduce, "tiny_policy_folder", lambda task, seed: tmp_path / "tiny")
    monkeypatch.setattr(reproduce, "load_policy", lambda model, task, device: policy)
    log_pi = reproduce.exact.candidate_log_probs(policy, task, problems).detach()
    weights, posterior = reproduce.level_weights(problems), reproduce.posterior(texts)
    elsewhere = weights @ (1 - log_pi.exp().sum(-1))
    assert 0.05 < elsewhere < 0.9
    for name, level in (("low", -1.0), ("high", 2.0)):
        monkeypatch.setattr(reproduce.learned, "load_verifier", lambda folder, task: Verifier(level))
        found = reproduce.verifier_metrics(name, 0)
        assert found["misfit@1"]["all"] == pytest.approx(elsewhere.item(), abs=0.04)
        if level < 0:
            for N in (1, 4, 32):
                expected = weights @ reproduce.optima.best_of_n(posterior, log_pi.exp(), posterior, N)
                assert found[f"bon@{N}"]["all"] == pytest.approx(expected.item(), abs=0.04)
            expected = reproduce.optima.auc_within(posterior, log_pi.exp(), posterior, weights, 64)
            assert found["AUC"]["all"] == found["AUC of q"]["all"] == pytest.approx(expected, abs=0.04)
        else:
            assert found["bon@32"]["all"] < 0.5 * found["bon@1"]["all"] and found["misfit@32"]["all"] > 0.7
            assert found["AUC"]["all"] < found["AUC of q"]["all"] - 0.1


# --- tables ----------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d{3}", text)]


def check_tables(result: dict, texts: dict[str, str]) -> None:
    """Every number of the tables is the one of results.json, rounded; a row each, in the same order."""
    rows = {name: [line.split("|")[1:-1] for line in text.splitlines()[2:]] for name, text in texts.items()}
    assert len(rows["claims"]) == len(result["rows"])
    for (claim, what, predicted, measured, share, verdict), row in zip(rows["claims"], result["rows"]):
        assert what.strip(" *") == row["what"] and verdict.strip() == row["verdict"]
        assert numbers(measured) == pytest.approx([row["mean"], row["ci95"]], abs=0.00051)
        assert numbers(predicted) == pytest.approx([] if row["predicted"] is None else [row["predicted"]], abs=0.00051)
        assert ("**" in what) == row["headline"] and (not claim.strip() or claims.PAGES[row["claim"]] in claim)
        if row["share"] is not None:
            assert float(share.strip(" %")) == pytest.approx(100 * row["mean"] / row["predicted"], abs=0.51)
        if row["claim"][0] != "B":
            mean, ci = mean_and_interval(row["values"])
            assert (mean, ci) == pytest.approx((row["mean"], row["ci95"]))
    first = {row["claim"]: row for row in result["rows"] if row["headline"]}
    assert [cells[0].strip() for cells in rows["claims-short"]] == [claim for claim in first if claim[0] != "E"]
    for claim, _, what, _, measured, _, verdict in rows["claims-short"]:
        row = first[claim.strip()]
        assert what.strip() == row["what"] and verdict.strip() == row["verdict"]
        assert numbers(measured) == pytest.approx([row["mean"], row["ci95"]], abs=0.00051)
    for cells, row in zip(rows["policies"], result["policies"], strict=True):
        expected = [x for column in zip(*row["points"]) for x in mean_and_interval(column)]
        assert numbers("|".join(cells[1:4])) == pytest.approx(expected, abs=0.00051)
    for cells, row in zip(rows["verifier"], result["verifier"], strict=True):
        expected = [x for x in row["predicted"] if x is not None]
        for label in ("before", "BoN-RL-V", "plain RL"):
            expected += mean_and_interval(row[label])
        assert numbers("|".join(cells[1:])) == pytest.approx(expected, abs=0.00051)


def published() -> dict[str, str]:
    found = {name: measure.published(name, "docs/results.md") for name in ("claims", "policies", "verifier")}
    return found | {"claims-short": measure.published("claims-short", "README.md")}


@pytest.mark.skipif(measure.published("claims", "docs/results.md") == "not run yet", reason="it is not run yet")
def test_tables_on_the_pages_are_those_of_results_json():
    check_tables(json.loads((ROOT / "benchmarks" / "results.json").read_text()), published())


def fake_runs(out, seeds: int, where: tuple[str, ...]) -> None:
    """exact.json of every run, with numbers that are all different."""
    rng = np.random.default_rng(0)
    metrics = [f"{kind}@{k}" for kind in ("pass", "bon", "misfit") for k in (1, 2, 4, 8, 16, 32)]
    metrics += ["maj@8", "kl", "AUC", "AUC of q", reproduce.BEST_MEAN]
    for seed in range(seeds):
        for name in ("base", *reproduce.RUNS):
            folder = reproduce.run_folder(out, name, seed)
            folder.mkdir(parents=True)
            levels = ("all", *map(str, range(2, 9)))
            values = {w: {m: {x: rng.random() for x in levels} for m in metrics} for w in where}
            (folder / "exact.json").write_text(json.dumps(values))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Where --publish writes, in place of the repository; no bandit."""
    folder = tmp_path / "repository"
    for name in ("benchmarks", "docs", ".github"):
        (folder / name).mkdir(parents=True)
    (folder / "docs" / "results.md").write_text((ROOT / "docs" / "results.md").read_text())
    (folder / "README.md").write_text("above\n<!-- claims-short:begin -->\nold\n<!-- claims-short:end -->\nbelow")
    monkeypatch.setattr(measure, "ROOT", folder)
    monkeypatch.setattr(reproduce, "bandit_rows", lambda: [])
    monkeypatch.setattr(reproduce.frontier, "save_figure", lambda path, panels: path.touch())
    monkeypatch.setattr(reproduce.frontier, "curve", lambda k: np.array([[0.0, 2.0], [1.0, 1.0]]))
    return folder


def test_published_tables_are_those_of_the_runs(here, tmp_path, capsys):
    out = tmp_path / "out"
    fake_runs(out, 3, ("held-out", "training", "before", "T = 0.7", "T = 1.3"))
    for _ in range(2):  # a second time replaces what the first has written
        reproduce.main(reproduce.Args(seeds=3, out=out, report=True, publish=True))
    result, texts = json.loads((here / "benchmarks" / "results.json").read_text()), published()
    check_tables(result, texts)
    assert (here / ".github" / "frontier.png").exists()
    assert measure.published("claims-machine", "docs/results.md").endswith("3 seeds.")
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts.values())
    assert (here / "README.md").read_text().endswith("<!-- claims-short:end -->\nbelow")
    # A comparison by hand, and the shares of the way.
    seeds = [reproduce.Seed(out, seed) for seed in range(3)]
    row = next(row for row in result["rows"] if row["what"] == "pass@8, k = 8 less mean, levels 6 to 8")
    by_hand = [
        sum(seed.at("hard-k8", "pass@8", (x,)) - seed.at("hard-mean", "pass@8", (x,)) for x in (6, 7, 8)) / 3
        for seed in seeds
    ]
    assert row["values"] == pytest.approx(by_hand) and row["runs"] == ["hard-k8", "hard-mean"]
    policy = next(row for row in result["policies"] if row["policy"] == "unbiased, k = 4")
    now, base = seeds[1].at("k4", "pass@4"), seeds[1].at("base", "pass@4")
    best = PREDICTIONS["policies"]["k4"]["pass@4"]
    assert policy["held-out"][1] == pytest.approx((now - base) / (best - base), rel=1e-3)
    way, *below = texts["policies"].splitlines()[3].split("|")[6:9]  # the policy `mean`, whose k is 1
    x, *ys = np.array(result["policies"][1]["points"]).T  # (S,) each
    assert [cell.strip() for cell in below] == [measure.interval(2 - x - y) for y in ys] and "%" in way
    assert json.loads((out / "measured.json").read_text())["unbiased, k = 4"] == policy["points"]


def test_the_table_of_baselines_is_paired_by_seed(tmp_path, capsys, monkeypatch):
    """u(k) has .5, .6 and .7; b(k+1) .1 more, .1 more and .4 more: .2 ± 4.303 x .1732 / sqrt(3) = .4303."""
    args = baselines.Args(k=2, n=4, seeds=3, out=tmp_path, report=True)
    runs, more = (
        baselines.Runs(args),
        {"u": (0, 0, 0), "b": (0.1, 0.1, 0.4), "others": (0, 0, 0), "posterior": (0, 0, 0)},
    )
    with pytest.raises(reproduce.BadInput, match="not all runs are in"):
        baselines.main(args)
    for name, seed in ((name, seed) for name in more for seed in range(3)):
        values = {"pass": 0.5 + seed / 10 + more[name][seed], "signal": seed / 10, "seconds": seed**2}
        runs.folder(name, seed).mkdir(parents=True)
        (runs.folder(name, seed) / "exact.json").write_text(json.dumps(values))
    capsys.readouterr()
    baselines.main(args)
    rows = [re.split("  +", row.strip()) for row in capsys.readouterr().out.splitlines()[:3]]
    assert rows[0][0] == "pass@2 ± 95%"
    assert rows[1] == ["u(k)", "0.6000 ± 0.2484", "-", "0.100", "1.000"]
    assert rows[2][2:] == ["+0.2000 ± 0.4303", "0.100", "1.000"] and rows[2][1].startswith("0.8000 ± ")


def test_a_run_of_a_baseline_is_a_command_and_its_values(tmp_path, monkeypatch):
    runs = baselines.Runs(baselines.Args(k=2, n=4, seeds=2, out=tmp_path, more="--steps 3"))
    script, *flags = runs.command("b", 1).split()
    args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
    assert (args.k, args.n, args.steps, args.model, args.seed) == (2, 4, 3, "tiny-1", 1)
    assert args.estimator.endswith("recipes/baselines.py:b") and runs.stages()[0] == [("u", 0), ("u", 1)]
    problems = [problem for problem in reproduce.prompts("held-out") if problem.level == 2][:2]
    monkeypatch.setattr(baselines.optima, "problems_of", lambda: problems)
    half = torch.full((2, 8), 0.5).log().masked_fill(torch.arange(8) > 1, -torch.inf).double()
    monkeypatch.setattr(reproduce, "log_probs", lambda model: half)
    (tmp_path / "metrics.jsonl").write_text('{"nonzero_advantage": 0.2}\n{"eval": 1}\n{"nonzero_advantage": 0.4}\n')
    (tmp_path / "timings.jsonl").write_text('{"seconds": 1}\n{"seconds": 5}\n{"seconds": 2}\n')
    found = runs.evaluation("b", 1, tmp_path)  # two names, each half: two tries find the right one with chance 3/4
    assert found == pytest.approx({"pass": 0.75, "signal": 0.3, "seconds": 2})


# --- runs ------------------------------------------------------------------------------------------------------------

DRIVER = """
import signal, sys
sys.path.insert(0, {benchmarks!r})
import reproduce
reproduce.RUNS = {runs!r}
reproduce.bandit_rows = lambda: []
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    reproduce.main(reproduce.Args(seeds=2, out=reproduce.Path("out")))
except reproduce.BadInput as mistake:
    sys.exit(f"error: {{mistake}}")
"""


@pytest.mark.slow
def test_runs_are_made_once_resumed_when_stopped_and_a_failed_one_is_named(here, monkeypatch, tmp_path, capsys):
    """Two settings of two seeds; the first try is stopped in training, the second comes to the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, task = harness.policy.warm_start, reproduce.the_task()

    def short(task, seed):
        saved, task.warm_start = task.warm_start, {"steps": 80, "batch": 64, "lr": 3e-3}
        try:
            return real(task, seed)
        finally:
            task.warm_start = saved

    monkeypatch.setattr(harness.policy, "warm_start", short)  # the processes find its result in the cache
    for seed in range(2):
        harness.policy.tiny_policy_folder(task, seed)
    small = "--steps 40 --lr 1e-4 --eval-every 0 --eval-problems 1 --eval-n 4 --n 4 --prompts-per-step 4"
    runs = {"mean": f"pass_at_k_pg.py {small} --k 4 --estimator mean", "k4": f"pass_at_k_pg.py {small} --k 4"}
    monkeypatch.setattr(reproduce, "RUNS", runs)
    (tmp_path / "driver.py").write_text(DRIVER.format(benchmarks=str(ROOT / "benchmarks"), runs=runs))
    out = tmp_path / "out"
    log = reproduce.run_folder(out, "mean", 0) / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "driver.py"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and '"step": 1,' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: stopped; the same command goes on" in err
    assert not log.with_name("exact.json").exists() and log.with_name("checkpoint.pt").exists()

    args = reproduce.Args(seeds=2, out=out)
    reproduce.main(args)
    assert "resuming at step" in (out / "logs" / f"{log.parent.name}.txt").read_text()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines() if "loss" in line] == list(range(1, 41))
    result = json.loads((out / "results.json").read_text())
    (row,) = (row for row in result["rows"] if row["what"] == "pass@4, k = 4 less mean" and row["headline"])
    paths = [[reproduce.run_folder(out, name, seed) / "exact.json" for seed in range(2)] for name in ("k4", "mean")]
    saved = [[json.loads(path.read_text())["held-out"]["pass@4"]["all"] for path in part] for part in paths]
    assert row["values"] == pytest.approx(list(np.subtract(*saved))) and max(map(abs, row["values"])) > 0
    policy = harness.policy.load_policy(str(paths[0][1].parent / "policy"), task, "cpu")
    problems = reproduce.prompts("held-out")
    with torch.no_grad():
        log_pi = reproduce.exact.candidate_log_probs(policy, task, problems)
    now = reproduce.optima.level_weights(problems) @ reproduce.exact.exact_metrics(log_pi, problems)["pass@4"]
    assert saved[0][1] == pytest.approx(now.item(), rel=1e-6)
    check_tables(result, reproduce.tables(result))
    assert {row["claim"] for row in result["rows"] if row["headline"]} == {"M1"}  # M2 has rows, but not its first

    made = {path: os.stat(path).st_mtime_ns for part in paths for path in part}
    capsys.readouterr()
    reproduce.main(reproduce.Args(seeds=2, out=out, report=True))
    assert json.loads((out / "results.json").read_text())["rows"] == result["rows"]
    assert reproduce.tables(result)["claims"] in capsys.readouterr().out
    paths[0][0].unlink()  # as if it had been killed before it was evaluated
    runs["k2"] = "pass_at_k_pg.py --k 0"
    with pytest.raises(reproduce.BadInput, match=r"these runs failed.*\n.*k2-s0-\w+: see .*txt\n.*k2-s1"):
        reproduce.main(args)
    assert [os.stat(path).st_mtime_ns == time for path, time in made.items()] == [False, True, True, True]
    assert json.loads((out / "results.json").read_text())["rows"] == result["rows"]
