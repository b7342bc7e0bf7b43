"""The scripts as their users run them: what a run leaves, what each flag changes, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from runs import SCRIPTS, SMALL, of_script, outcome, records, save_untrained, steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import bandit
import harness.report
from verifiers import arithmetic

PASS, MAJ, RL, SFT = SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_start_to_end(script, uninterrupted):
    folder, _, out = uninterrupted(script)
    assert json.loads((folder / "args.json").read_text())["n"] == (6 if script == "bon_rl.py" else 4)
    metric = "maj@2" if script.startswith("maj") else "pass@2"
    log = records(folder)
    assert [r["step"] for r in log if "eval" in r] == [0, 3, 6]
    assert [r["step"] for r in steps_of(folder)] == [*range(1, 7)]
    keys = {"reward", "loss", "grad_norm", "nonzero_advantage", "expert_reward" if script == "bon_sft.py" else metric}
    assert all(keys <= r.keys() for r in steps_of(folder))
    assert metric in out and " -> " in out
    assert (folder / "curves.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(folder / "policy"), AutoTokenizer.from_pretrained(folder / "policy")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_size_that_a_flag_names_is_reported(script, run, untrained):
    """24 and 3 are no powers of two."""
    flags = [*"--task arithmetic --steps 0 --k 3 --n 9 --eval-n 24 --eval-problems 1 --model".split(), untrained]
    result = run(script, *flags)
    assert result.returncode == 0, result.stderr
    metric = "maj" if script.startswith("maj") else "pass"
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("all ")]
    assert {f"{metric}@3", "pass@24"} <= {row[1] for row in rows}
    (folder,) = Path("runs").iterdir()  # an evaluation trains nothing and leaves no policy
    assert steps_of(folder) == [] and not (folder / "policy").exists() and "no step had a signal" not in result.stdout


def test_equal_arguments_give_equal_metrics_and_another_folder(run, skilled, tmp_path):
    for _ in range(2):
        assert run(PASS, *SMALL, "--model", skilled).returncode == 0
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda folder: len(folder.name))
    assert second.name == f"{first.name}-2"
    assert outcome(first) == outcome(second) and any(r["nonzero_advantage"] > 0 for r in steps_of(first))


def test_a_model_without_a_pad_token_runs(run, tmp_path):
    """Filler is masked, never read: a pad token has no use here."""
    result = run(PASS, *SMALL, "--model", save_untrained(tmp_path / "model", pad=False))
    assert result.returncode == 0, result.stderr


# What is checked for all scripts, and called --k or --N as they have it; and what some check.
OF_EACH = [
    (["--k", "8", "--n", "4"], "--n must be at least 8 (--k 8 takes that many samples), not 4"),
    (["--k", "8", "--n", "9", "--eval-n", "4"], "--eval-n must be at least 8"),
    (["--k", "0"], "--k must be at least 1, not 0"),
    (["--k", "1", "--n", "1", "--kl-coef", "1"], "--kl-coef needs --n 2 or more"),
    (["--max-new-tokens", "64"], "exceed the model's context of 64"),
    (["--estimator", "best"], "best"),
    (["--bogus", "1"], "bogus"),
]
OF_ALL = [
    (["--steps", "-1"], "--steps must be at least 0"),
    (["--temperature", "0"], "--temperature must be a positive number, not 0.0"),
    (["--lr", "nan"], "--lr must be a positive number, not nan"),
    (["--task", "sudoku"], "unknown task 'sudoku': choose one of arithmetic, "),
    (["--data", "x.jsonl"], "makes its own problems: leave --data out"),
    (["--levels", "9"], "no training problems at --levels 9"),
    (["--model", "no/such-model"], "cannot load --model 'no/such-model'"),
    (["--kl-coef", "nan"], "--kl-coef must be at least 0, not nan"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
    (["--sample-rows", "0"], "--sample-rows must be at least 1, not 0"),
    (["--device", "tpu"], "--device must be auto, cpu or cuda, not 'tpu'"),
    (["--run-name", "a/../../b"], "--run-name"),
    (["--no-chat"], "no chat template: leave --no-chat out"),
]


OF_SOME = [
    *((x, ["--k", "1", "--estimator", "biased"], "--estimator biased with --k 1 is zero by") for x in (PASS, MAJ)),
    (RL, ["--estimator", "recipes/all_right.py:all_right"], "recipes/all_right.py:all_right"),  # a file: pass@k's alone
    (RL, ["--estimator", "variational"], "--estimator variational needs --n 6 or a larger multiple of --N, not 4"),
    (RL, ["--estimator", "variational", "--n", "7"], "needs --n 6 or a larger multiple of --N, not 7"),
    (RL, ["--estimator", "variational", "--baseline", "value", "--n", "2"], "needs --n 4 or a larger multiple"),
    (RL, ["--baseline", "value"], "--baseline value is for --estimator mean and variational"),
    (RL, ["--estimator", "rlb", "--verifier", "learned"], "rlb is a closed form for --verifier environment"),
    (RL, ["--log-kl", "--anchor-rate", "2"], "--anchor-rate must lie between 0 and 1, not 2.0"),
    (RL, ["--k", "1", "--n", "1", "--kl-coef-end", "1"], "--kl-coef needs --n 2 or more"),
    (RL, ["--kl-coef-end", "1", "--kl-delay", "-1"], "--kl-delay must be at least 0"),
    (RL, ["--estimator", "mean", "--baseline", "value", "--value-lr", "0"], "--value-lr must be a positive number"),
    (RL, ["--preset", "large"], "large"),
    (RL, ["--verifier", "learned", "--verifier-model", "no/such"], "cannot load the verifier 'no/such'"),
    (SFT, ["--k", "0"], "--N must be at least 1, not 0"),
    (SFT, ["--k", "8", "--n", "9"], "--eval-n must be at least 8"),
    (SFT, ["--n", "2"], "--n must be more than --N 2, not 2"),
    (SFT, ["--eval-N", "5"], "--eval-N must lie between 1 and --eval-n 4, not 5"),
    (SFT, ["--likelihood", "exact", "--verifier", "learned"], "exact is a closed form for --verifier environment"),
    (SFT, ["--experts", "no.jsonl"], "no.jsonl does not exist"),
]
REFUSED = [*((x, *case) for x in (PASS, RL) for case in OF_EACH), *((PASS, *case) for case in OF_ALL), *OF_SOME]


@pytest.mark.parametrize("script, flags, complaint", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_clear_line(script, flags, complaint, run, untrained, tmp_path):
    result = run(script, *SMALL, "--model", untrained, *flags)
    assert result.returncode == 2
    assert of_script(script, complaint) in result.stderr and "Traceback" not in result.stderr
    if result.stderr.startswith("error:"):  # ours; the parser's own has a frame
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_papers_preset_and_flags_beside_it(run, untrained, tmp_path):
    flags = "--preset paper --task arithmetic --N 2 --steps 0 --lr 1e-5 --eval-n 2 --eval-problems 1 --model".split()
    result = run(RL, *flags, untrained)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    args = json.loads((folder / "args.json").read_text())
    expected = {"lr": 1e-5, "prompts_per_step": 32, "warm_up_steps": 100, "anchor_rate": 0.01, "kl_coef": 1.0,
                "kl_coef_end": 0.075, "kl_delay": 10, "kl_anneal_steps": 2500, "value_lr": 1e-5}  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_a_model_without_an_end_token_is_refused(run, tmp_path):
    result = run(PASS, *SMALL, "--model", save_untrained(tmp_path / "model", eos=False))
    assert result.returncode == 2 and "has no end-of-sequence token" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_tiny_is_refused_for_a_task_it_cannot_learn(run, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    result = run(PASS, "--task", "gsm8k", "--data", str(tmp_path / "train.jsonl"))
    assert result.returncode == 2 and "--model tiny cannot learn task 'gsm8k'" in result.stderr


def test_bandit(run, tmp_path):
    result = run("bandit.py", "--seeds", "20", "--steps", "40")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("after 40 steps; ± is a 95% interval over 20 seeds (Student's t)\n")[1].splitlines()
    assert lines[0].split() == "advantages mean reward max@4 KL".split() and "figure: runs/bandit.png" in lines
    trained = bandit.trajectory(bandit.Args(seeds=20, steps=40), "mean x k")[-1]  # (3, 20)
    halves = 2.0930 * trained.std(-1) / math.sqrt(20)  # Student's t for 19 degrees of freedom
    cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in zip(trained.mean(-1), halves)]
    assert lines[2].split("  ")[0] == "mean x k" and [x for x in lines[2].split("  ")[1:] if x] == cells
    assert (tmp_path / "runs/bandit.png").stat().st_size > 10_000
    result = run("bandit.py", "--k", "1")
    assert result.returncode == 2 and result.stderr.strip() == "error: --k must be at least 2, not 1"


@pytest.mark.parametrize("one_file", [True, False])
def test_an_evaluation_on_training_problems_says_so(one_file, run, untrained, tmp_path):
    """In a line, in the table's title and the figure's; not where the file is evaluated alone."""
    rows = [json.dumps({"problem": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(3)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(rows if one_file else rows[name == "test.jsonl" :]))
    data = tmp_path / "train.jsonl" if one_file else tmp_path
    flags = "--task gsm8k --steps 1 --k 2 --n 2 --prompts-per-step 1 --eval-n 2 --eval-problems 2 --max-new-tokens 2"
    flags = [*flags.split(), "--data", str(data), "--model", untrained]
    titles, save_figure = [], harness.report.save_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.report, "save_figure", lambda *args: titles.append(args[-1]))
        result = run(PASS, *flags)
    line, on = "no test.jsonl: the evaluation below is on the TRAINING problems", "TRAINING" if one_file else "held-out"
    assert result.returncode == 0 and (line in result.stdout.splitlines()) == one_file, result.stderr
    assert f"2 {on} problems; " in result.stdout and titles == [on] and save_figure is harness.report.save_figure
    if one_file:
        result = run(PASS, *flags, "--steps", "0")
        assert line not in result.stdout and "2 held-out problems; " in result.stdout


@pytest.mark.parametrize("task, there, mend", [
    ("gsm8k", "train", "held-out problems here: add test.jsonl to {}"),
    ("math500", "test", "training problems here: --steps 0 evaluates on held-out ones"),
])  # fmt: skip
def test_a_task_without_a_split_says_what_to_do(task, there, mend, run, untrained, tmp_path):
    (tmp_path / f"{there}.jsonl").write_text(json.dumps({"problem": "1+1=", "answer": "2", "solution": ""}) + "\n")
    flags = [*SMALL, "--levels", "--task", task, "--data", str(tmp_path), "--model", untrained]
    line = f"error: the task has no {mend.format(tmp_path)}"
    assert run(PASS, *flags).stderr.splitlines()[-1] == line


def test_events_in_the_verifier_are_summed_over_an_evaluation(run, untrained, monkeypatch, tmp_path):
    """Timeouts are never silent zeros, in evaluation either."""
    verify = arithmetic.verify
    monkeypatch.setattr(arithmetic, "verify", lambda *args: dataclasses.replace(verify(*args), counts={"timeouts": 2}))
    result = run(PASS, *SMALL, "--steps", "0", "--model", untrained)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert records(folder)[0]["timeouts"] == 2


@pytest.mark.parametrize("first", [1, 3], ids=["at once", "in a training step"])
@pytest.mark.parametrize("script, flags", [(RL, ["--estimator", "rlb"]), (SFT, ["--likelihood", "exact"])])
def test_a_closed_form_for_rewards_0_and_1_refuses_others(script, flags, first, run, untrained, monkeypatch):
    verify, calls = arithmetic.verify, []

    def higher(*args):
        calls.append(args)
        verdict = verify(*args)
        return dataclasses.replace(verdict, rewards=verdict.rewards + 0.5) if len(calls) >= first else verdict

    monkeypatch.setattr(arithmetic, "verify", higher)
    result = run(script, *SMALL, *flags, "--model", untrained)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "is for rewards 0 and 1, 'arithmetic' has others" in line, result.stderr
    assert "(step 0 is saved: mend it, then --resume runs/" in line and "Traceback" not in result.stderr
