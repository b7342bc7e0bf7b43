"""benchmarks/real_model.py without its models: its commands, which runs are done, its tables."""

import json
import re

import numpy as np
import pytest
import real_model
from runs import parsed
from test_reproduce import rows_of


@pytest.fixture
def args(tmp_path):
    return real_model.Args(out=tmp_path / "out", records=tmp_path / "records.json")


def test_every_run_is_a_command_that_its_script_takes_and_rl_starts_from_the_sft_of_its_seed(args):
    runs = real_model.Runs(args)
    stages = runs.stages()
    assert stages[0] == [("smollm2 sft", 0)] and stages[2] == [("gemma3 sft", 0)] and stages[-2] == [("smollm2 sft", 4)]
    assert stages[1] == [(f"smollm2 {name}", 0) for name in real_model.RUNS if name != "sft"]
    assert stages[3] == [("gemma3 mean", 0), ("gemma3 k8", 0)] and sum(map(len, stages)) == 5 * 7 + 3 * 3
    assert real_model.Runs(real_model.Args("gemma3", seeds=1)).stages() == [[("gemma3 sft", 0)], stages[3]]
    for model, (names, lr, _, _) in real_model.MODELS.items():
        for name in names:
            settings = parsed(runs.command(f"{model} {name}", 2))
            assert (settings.seed, settings.task, settings.steps) == (2, "suspects", 60) and settings.lr_decay
            assert re.fullmatch(r"[\w.-]+", runs.folder(f"{model} {name}", 2).name)  # --run-name takes it
            sft = f"runs/{runs.folder(f'{model} sft', 2).name}/policy"
            assert settings.model == (f"models/{model}" if name == "sft" else sft)
            # Runs that are compared see as many prompts and samples.
            size = settings.lr, settings.prompts_per_step
            assert size == ((5e-5, 16) if name == "sft" else (lr, 32)) and (name == "sft" or settings.n == 16)
    assert parsed(real_model.Runs(real_model.Args(flags="--steps 2")).command("gemma3 k8", 0)).steps == 2


def record(runs, name: str, seed: int, **metrics) -> dict:
    model, _, run = name.partition(" ")
    zeros = dict.fromkeys([*real_model.PASS, "maj@8", "elsewhere", "kl"], 0.0)
    return {"model": model, "run": run, "seed": seed, **zeros, **metrics, "command": runs.command(name, seed)}


def test_a_run_is_done_when_it_has_its_line_and_an_sft_while_rl_needs_its_policy(args):
    runs = real_model.Runs(args)
    names = [f"gemma3 {name}" for name in ("sft", "mean", "k8")]

    def write(*some: str) -> None:
        rows = [record(runs, name, 0) for name in some]
        args.records.write_text(real_model.measure.records_json({"machine": {}, "runs": rows}))

    assert not any(runs.done(name, 0) for name in names)
    write(*names[:2])
    assert [runs.done(name, 0) for name in names] == [False, True, False]  # its policy is not there, and k8 is left
    (runs.folder(names[0], 0) / "policy").mkdir(parents=True)
    assert [runs.done(name, 0) for name in names] == [True, True, False] and not runs.done(names[1], 1)
    (runs.folder(names[0], 0) / "policy").rmdir()
    write(*names)
    assert all(runs.done(name, 0) for name in names)
    other = real_model.Runs(real_model.Args(out=args.out, records=args.records, flags="--steps 2"))
    assert not any(other.done(name, 0) for name in names)  # another command is another run


def test_tables_by_hand(args, monkeypatch):
    monkeypatch.setattr(real_model.frontier, "curve", lambda k: np.array([[0.2, 0.9], [0.6, 0.7]]))
    runs = real_model.Runs(args)
    rows = [record(runs, "smollm2 mean", s, **{"pass@1": 0.6, "pass@8": 0.7, "kl": 0.5}) for s in range(3)]
    rows += [record(runs, "smollm2 k8", s, **{"pass@1": 0.4, "pass@8": 0.75 + s / 100}) for s in range(3)]
    rows += [record(runs, "gemma3 k8", s, **{"pass@1": 0.4, "pass@8": 0.9}) for s in range(2)]
    policies, compared = map(rows_of, real_model.tables(rows).values())
    k8 = "unbiased, k = 8"
    expected = [["SmolLM2-135M", "mean", "3"], ["SmolLM2-135M", k8, "3"], ["Gemma 3 270M", k8, "2"]]
    assert [row[:3] for row in policies] == expected
    # .76 ± 4.303 x .01 / sqrt(3) = .025; at pass@1 .4 the frontier has .8
    assert [policies[1][6], policies[1][9], policies[0][11]] == ["0.760 ± 0.025", "0.040 ± 0.025", "0.500 ± 0.000"]
    (row,) = (row for row in compared if f"pass@8, {k8} minus mean" in row[1])
    known = json.loads(real_model.optima.PREDICTIONS.read_text())["policies"]
    limit = known["k8"]["pass@8"] - known["k1"]["pass@8"]
    assert row[2:] == [f"{limit:+.3f}", "+0.060 ± 0.025", f"{0.06 / limit:.0%}", "holds"]
    panels = real_model.panels(rows)
    assert [title for title, _, _ in panels] == [real_model.TITLES[x] for x in ("tiny", "smollm2", "gemma3")]
    assert panels[1][2][k8].tolist() == [[0.4, 0.75, 0], [0.4, 0.76, 0], [0.4, 0.77, 0]]


def test_what_cannot_be_reported_is_refused(args):
    args.report = True
    with pytest.raises(real_model.BadInput, match="no run is in .* yet"):
        real_model.main(args)
    with pytest.raises(real_model.BadInput, match="give it --records of its own"):
        real_model.main(real_model.Args(report=True, flags="--steps 2"))
    with pytest.raises(real_model.BadInput, match="--seeds must lie between 1 and 10"):
        real_model.main(real_model.Args(report=True, seeds=11))
