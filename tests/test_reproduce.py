"""benchmarks/reproduce.py: its statistics, and its runs, stopped and taken up again, on small ones."""

import importlib
import json
import sys

import numpy as np
import pytest
import tyro
from test_cli import ROOT, save_untrained

sys.path.insert(0, str(ROOT / "benchmarks"))
reproduce = importlib.import_module("reproduce")


def test_the_interval_is_students():
    """For 1 .. 5: mean 3, deviation sqrt(2.5), half-width 2.776 sqrt(2.5 / 5) = 1.963 (any table of t)."""
    mean, ci = reproduce.measure.interval(np.array([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0], [5.0, -5.0]]))
    assert mean.tolist() == [3, -3] and ci == pytest.approx([1.963, 1.963], abs=1e-3)
    assert [reproduce.verdict(x, 1.963) for x in (3, -3, 1, -1)] == ["holds", "does not", *["not decidable"] * 2]


def test_every_run_is_a_command_that_its_script_takes():
    commands = [c for x in reproduce.RUNS.values() for c in (x if isinstance(x, tuple) else (x,))]
    for command in (*commands, *reproduce.FIRST.values()):
        script, *flags = command.split()
        tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)


def test_the_readme_of_benchmarks_has_the_command_of_every_run():
    commands = {name: c if isinstance(c, tuple) else (c,) for name, c in reproduce.RUNS.items()}
    lines = [f"{'' if i else name:<20}{part}" for name, parts in commands.items() for i, part in enumerate(parts)]
    assert "\n".join(lines) in (ROOT / "benchmarks" / "README.md").read_text()


def test_every_claim_is_about_runs_that_are_made():
    runs = reproduce.Runs(reproduce.Args())

    class Recorder(reproduce.Results):
        def log(self, name, part=0):
            runs.commands[name][part]
            evaluation = {str(level): {f"{m}@{2**i}": [0.0, 0.0] for m in ("pass", "maj", "bon") for i in range(6)}
                          for level in ("all", 1, 2, 3, 4, 5)}  # fmt: skip
            times = 1 if part else 2
            return [{"step": 0, "eval": evaluation}] * times + [
                {"eval_at": T, "result": evaluation} for T in (0.7, 1.3) for _ in range(times)
            ]

    assert all(claim.value(Recorder(runs, 0)) == 0 for claim in reproduce.claims())
    assert set(reproduce.QUICK) <= set(reproduce.RUNS)
    made = {runs.folder(name, 0) for name in reproduce.FIRST} | {runs.folder("sft", 1)}
    read = [word.split("/")[1] for word in runs.command("sft", 1, part=1).split() if word.startswith("runs/")]
    assert len(read) == 2 and set(read) <= {folder.name for folder in made}


@pytest.mark.slow
def test_runs_are_made_once_and_a_failed_one_is_named(monkeypatch, capsys, tmp_path):
    """Two seeds of a run that fails, and of one of two parts, of which the second reads what the first has made."""
    small = (
        f"--N 2 --eval-problems 1 --eval-n 4 --steps 1 --prompts-per-step 2 --model {save_untrained(tmp_path / 'x')}"
    )
    scored = "bon_sft.py --N 2 --eval-problems 1 --eval-n 4 --steps 0 --model {run:two}/policy"
    monkeypatch.setattr(reproduce, "RUNS", {"one": "bon_sft.py --N 0", "two": (f"bon_sft.py {small}", scored)})
    monkeypatch.setattr(reproduce, "FIRST", {})
    claims = [reproduce.Claim("X1", "what was seen", "pass@4", lambda r: 1 + r.seed + r.change("two", "pass@4"))]
    monkeypatch.setattr(reproduce, "claims", lambda: claims)
    monkeypatch.setattr(reproduce, "bandit_rows", lambda out: [])
    monkeypatch.setattr(reproduce.measure, "describe_machine", lambda threads: {})  # it sets them for all tests behind
    args = reproduce.Args(seeds=2, jobs=2, out=tmp_path / "out")
    with pytest.raises(reproduce.BadInput, match=r"these runs failed.*\n.*one-s0-\w+: see .*txt\n.*one-s1"):
        reproduce.main(args)
    (row,) = json.loads((args.out / "results.json").read_text())["rows"]
    assert row["values"] == [1, 2] and row["seeds"] == 2 and list(row["runs"]) == ["two"]
    assert "| X1 | what was seen | pass@4 | +1.500 ± 6.353 | not decidable | two |" in capsys.readouterr().out
    figures = sorted((args.out / "runs").glob("two*/curves.png"))
    assert len(figures) == 4
    made = {path: path.stat().st_mtime_ns for path in figures}
    figures[0].unlink()  # as if it had been killed at its very end
    del reproduce.RUNS["one"]
    reproduce.main(args)
    assert [path.stat().st_mtime_ns == made[path] for path in figures] == [False, True, True, True]
