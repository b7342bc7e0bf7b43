"""benchmarks/real_model.py without its model: its commands, what it reads from a run, its tables."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
real_model = importlib.import_module("real_model")


def parsed(runs, name: str, seed: int):
    script, *flags = shlex.split(runs.command(name, seed))
    return tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)


def test_every_run_is_a_command_that_its_script_takes_and_rl_on_lines_starts_from_the_sft(tmp_path):
    runs = real_model.Runs(real_model.Args(tmp_path / "model", out=tmp_path / "a" / "out"))
    three = [(name, s) for name in runs.names if name != "sft" for s in range(3)]
    assert sorted(sum(runs.stages(), [])) == sorted([("sft", 0), *three]) and set(runs.names) == set(real_model.RUNS)
    assert runs.stages()[0] == [("sft", 0)]
    alone = real_model.Runs(real_model.Args(task="sums", seeds=1))
    assert alone.stages() == [[], [(name, 0) for name in real_model.SUMS]]
    for name in real_model.RUNS:
        args = parsed(runs, name, 2)
        assert args.seed == 2 and (args.task == "sums") == (name in real_model.SUMS)
        sft = f"runs/{runs.folder('sft').name}/policy"
        models = dict.fromkeys(real_model.SUMS, "../../model") | {"sft": "../../model-plain"}
        assert args.model == models.get(name, sft)
        assert parsed(real_model.Runs(real_model.Args(flags="--steps 2")), name, 0).steps == 2 != args.steps
    assert parsed(runs, "sft", 0).task == "lines_uniform" and parsed(runs, "lines-rlb", 0).task == "lines"
    # Runs that are compared see as many prompts and samples.
    settings = {name: parsed(runs, name, 0) for name in runs.names}
    sizes = {name: (a.steps, a.prompts_per_step, a.n, a.lr) for name, a in settings.items() if name != "sft"}
    assert len({sizes[name] for name in real_model.SUMS}) == len({sizes[name] for name in real_model.LINES[1:]}) == 1


def test_an_evaluation_has_the_kl_of_the_steps_around_it(tmp_path):
    """Step t logs the KL of the policy after t - 1 steps: t, here, so that after 3 steps it is the mean of 2 to 6."""
    runs = real_model.Runs(real_model.Args(tmp_path / "model", out=tmp_path))
    lines = [{"step": step, "kl": float(step), "loss": 0.0} for step in range(1, 7)]
    for step in (0, 3, 6):
        level = {"pass@1": [step / 10, 0.01], "maj@8": [step / 20, 0.01]}
        lines.insert(step + step // 3, {"step": step, "eval": {"all": {"pass@1": [9.0, 0]}, "1": level}})
    (tmp_path / "args.json").write_text(json.dumps({"steps": 6, "levels": [1]}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.evaluation("mean", 0, tmp_path)
    assert found[0] == {"pass@1": 0, "maj@8": 0, "kl": 0} and found[3] == {"pass@1": 0.3, "maj@8": 0.15, "kl": 4.0}
    assert found[6] == {"pass@1": 0.6, "maj@8": 0.3, "kl": 5.5}  # 5 and 6


def test_published_tables_are_those_of_the_runs(tmp_path, monkeypatch, capsys):
    """Runs of three seeds with numbers that are all different, one of them not done yet."""
    here = tmp_path / "repository" / "benchmarks"
    (here.parent / ".github").mkdir(parents=True)
    here.mkdir()
    names = ("real-sums", "real-lines", "real-compared")
    marked = "above\n" + "".join(f"<!-- {x}:begin -->\nold\n<!-- {x}:end -->\n" for x in names) + "below"
    for path in (here / "README.md", here.parent / "README.md"):
        path.write_text(marked)
    monkeypatch.setattr(real_model.reproduce, "HERE", here)
    monkeypatch.setattr(real_model.measure, "describe_machine", lambda threads: {})
    monkeypatch.setattr(real_model, "curve", lambda: np.array([[0.2, 0.9], [0.6, 0.7]]))
    rng, metrics = np.random.default_rng(0), [*real_model.PASS, "kl"]
    args = real_model.Args(tmp_path, seeds=3, report=True, publish=True, out=tmp_path / "out")
    runs = real_model.Runs(args)
    for name in real_model.RUNS:
        for seed in range(1 if name == "sft" else 2 if name == "vote" else 3):
            folder, steps = runs.folder(name, seed), ("0", "20", "60") if name in real_model.SUMS else ("40",)
            folder.mkdir(parents=True)
            values = {step: {metric: rng.random() for metric in metrics} for step in steps}
            values[steps[-1]] |= {"maj@8" if name in real_model.SUMS else "elsewhere": rng.random()}
            values["0"] = values.get("0", {}) | {"maj@8": rng.random()} if name in real_model.SUMS else {}
            (folder / "exact.json").write_text(json.dumps({step: v for step, v in values.items() if v}))
    real_model.main(args)
    printed, result = capsys.readouterr().out, json.loads((here / "real_model.json").read_text())
    assert {task: part["seeds"] for task, part in result.items()} == {"sums": 2, "lines": 3}
    assert (here.parent / ".github" / "real_model.png").stat().st_size > 10_000
    text = (here.parent / "README.md").read_text()
    assert text == (here / "README.md").read_text() and "\nold\n" not in text and text.endswith("below")
    tables = [re.search(f"<!-- {x}:begin -->\n(.*?)\n<!-- {x}:end -->", text, re.S)[1] for x in names]
    assert all(table in printed for table in tables)
    sums, lines, compared = ([row.split("|")[1:-1] for row in table.splitlines()[2:]] for table in tables)
    seeds = [[json.loads((runs.folder(x, s) / "exact.json").read_text()) for s in (0, 1)] for x in ("k8", "mean")]
    mean, ci = real_model.measure.interval(np.array([seed["60"]["pass@8"] for seed in seeds[0]]))
    (row,) = (row for row in sums if row[0].strip() == "unbiased, k = 8" and row[1].strip() == "60")
    assert row[5].strip() == f"{mean:.3f} ± {ci:.3f}" and len(sums) == 1 + 4 * 2
    mean, ci = real_model.measure.interval(np.array([a["60"]["pass@8"] - b["60"]["pass@8"] for a, b in zip(*seeds)]))
    (row,) = (row for row in compared if "`sums`: pass@8, unbiased" in row[0])
    assert row[1].strip() == f"{mean:+.3f} ± {ci:.3f}" and row[2].strip() == real_model.reproduce.verdict(mean, ci)
    best = [float(x) for x in lines[1][1:7]]
    weights, problems = real_model.optima.prompt_weights, real_model.optima.prompts_once()
    expected = [weights(problems) @ real_model.load_task("lines").best(problems, 8)]
    assert best[3] == pytest.approx(expected[0].item(), abs=0.0006) and best[0] < float(lines[0][1])
    sft = json.loads((runs.folder("sft") / "exact.json").read_text())["40"]
    assert [float(x) for x in lines[2][1:7]] == pytest.approx([sft[x] for x in real_model.PASS], abs=0.0006)
    frontier = 0.9 - 0.5 * min(max(sft["pass@1"] - 0.2, 0), 0.4)
    assert float(lines[2][7]) == pytest.approx(frontier - sft["pass@8"], abs=0.0006)

    # The runs on one task, published again, leave those on the other as they were.
    for path in runs.out.glob("runs/*/exact.json"):
        if path.parent not in [runs.folder(name, seed) for name in real_model.SUMS for seed in range(3)]:
            path.unlink()
    (runs.folder("vote", 2)).mkdir(exist_ok=True)
    shutil.copy(runs.folder("vote", 1) / "exact.json", runs.folder("vote", 2))
    args.task = "sums"
    real_model.main(args)
    again, text = json.loads((here / "real_model.json").read_text()), (here / "README.md").read_text()
    assert again["sums"]["seeds"] == 3 and again["lines"] == result["lines"]
    assert tables[0] not in text and tables[1] in text


def test_what_cannot_be_reported_or_published_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.measure, "describe_machine", lambda threads: {})
    out = Path(tmp_path / "out")
    with pytest.raises(real_model.BadInput, match="no seed has all its runs"):
        real_model.main(real_model.Args(report=True, out=out))
    with pytest.raises(real_model.BadInput, match="leave --flags out"):
        real_model.main(real_model.Args(report=True, publish=True, flags="--steps 2", out=out))
    with pytest.raises(real_model.BadInput, match="--seeds must lie between 1 and 10"):
        real_model.main(real_model.Args(report=True, seeds=11, out=out))
