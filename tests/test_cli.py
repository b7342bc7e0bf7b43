"""The scripts as their users run them: what a run leaves, what each flag changes, and what is refused."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from runs import SCRIPTS, SMALL, in_process, of_script, outcome, records, save_untrained, steps_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bandit
import harness.report
from verifiers import arithmetic


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


def test_equal_arguments_give_equal_metrics_and_another_folder(run, skilled, tmp_path):
    for _ in range(2):
        assert run("pass_at_k_pg.py", *SMALL, "--model", skilled).returncode == 0
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda folder: len(folder.name))
    assert second.name == f"{first.name}-2"
    assert outcome(first) == outcome(second) and any(r["nonzero_advantage"] > 0 for r in steps_of(first))


TRAINS = ["--steps", "3", "--eval-n", "3", "--eval-problems", "1", "--n", "6"]
RL, SFT = "bon_rl.py", "bon_sft.py"


@pytest.fixture(scope="module")
def trained(skilled, tmp_path_factory):
    """trained(script, *flags) -> the weights after a short run with an effect, (P,), its log, and what it printed."""
    made = {}

    def result(script, *flags):
        if (script, flags) not in made:
            with contextlib.chdir(tmp_path_factory.mktemp("trained")):
                ended = in_process(script, *SMALL, *TRAINS, "--model", skilled, "--run-name", "a", *flags)
                assert ended.returncode == 0, ended.stderr
                log, policy = steps_of(Path("runs/a")), Path("runs/a/policy/model.safetensors")
                learnt = any(r["nonzero_advantage"] > 0 and r["grad_norm"] > 0 for r in log)
                assert learnt or not log, "no gradient: no flag could be seen"
                weights = flat(policy) if log else None
                made[script, flags] = weights, log, ended.stdout
        return made[script, flags]

    result.start = flat(Path(skilled) / "model.safetensors")
    return result


def flat(file: Path) -> torch.Tensor:
    """All weights as one vector."""
    return torch.cat([x.flatten() for _, x in sorted(load_file(file).items())])


@pytest.mark.parametrize("flags", ["--gradient-checkpointing", "--micro-batch-tokens 1", "--sample-rows 5"])
def test_a_flag_of_memory_changes_nothing_but_rounding(trained, flags):
    (without, before, _), (weights, log, _) = trained("pass_at_k_pg.py"), trained("pass_at_k_pg.py", *flags.split())
    assert (weights - without).norm() < 1e-4 * (without - trained.start).norm()
    assert [r["reward"] for r in log] == [r["reward"] for r in before]


def test_steps_0_evaluates_and_leaves_no_policy(trained):
    weights, log, out = trained(RL, "--estimator", "rlb-all", "--steps", "0")
    assert weights is None and log == [] and "pass@2" in out


def test_a_model_without_a_pad_token_runs(run, tmp_path):
    """Filler is masked, never read: a pad token has no use here."""
    result = run("pass_at_k_pg.py", *SMALL, "--model", save_untrained(tmp_path / "model", pad=False))
    assert result.returncode == 0, result.stderr


# What each script checks, or names, in its own way; and what the harness checks for all of them.
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
    ("pass_at_k_pg.py", ["--k", "1", "--estimator", "biased"], "--estimator biased with --k 1 is zero by definition"),
    ("majority_pg.py", ["--k", "1", "--estimator", "biased"], "--estimator biased with --k 1 is zero by definition"),
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
    (SFT, ["--n", "2"], "--n must be more than --N 2, not 2"),
    (SFT, ["--eval-N", "5"], "--eval-N must lie between 1 and --eval-n 4, not 5"),
    (SFT, ["--likelihood", "exact", "--verifier", "learned"], "exact is a closed form for --verifier environment"),
    (SFT, ["--experts", "no.jsonl"], "no.jsonl does not exist"),
]
REFUSED = [*((script, *case) for script in SCRIPTS for case in OF_EACH), *((SCRIPTS[0], *case) for case in OF_ALL)]
REFUSED += OF_SOME


@pytest.mark.parametrize("script, flags, complaint", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_clear_line(script, flags, complaint, run, untrained, tmp_path):
    if script == SFT and {"--kl-coef", "--estimator"} & {*flags}:
        complaint = flags[-2]  # an option that it does not have
    result = run(script, *SMALL, "--model", untrained, *flags)
    assert result.returncode == 2
    assert of_script(script, complaint) in result.stderr and "Traceback" not in result.stderr
    if result.stderr.startswith("error:"):  # ours; the parser's own has a frame
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_papers_preset_and_flags_beside_it(run, untrained, tmp_path):
    flags = "--preset paper --task arithmetic --N 2 --steps 1 --lr 1e-5 --eval-n 2 --eval-problems 1".split()
    flags += ["--max-new-tokens", "2"]
    result = run(RL, *flags, "--model", untrained)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    args = json.loads((folder / "args.json").read_text())
    expected = {"lr": 1e-5, "prompts_per_step": 32, "warm_up_steps": 100, "anchor_rate": 0.01, "kl_coef": 1.0,
                "kl_coef_end": 0.075, "kl_delay": 10, "kl_anneal_steps": 2500, "value_lr": 1e-5}  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_a_model_without_an_end_token_is_refused(run, tmp_path):
    result = run("pass_at_k_pg.py", *SMALL, "--model", save_untrained(tmp_path / "model", eos=False))
    assert result.returncode == 2 and "has no end-of-sequence token" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_tiny_is_refused_for_a_task_it_cannot_learn(run, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    result = run("pass_at_k_pg.py", "--task", "gsm8k", "--data", str(tmp_path / "train.jsonl"))
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


def test_compare_averages_over_seeds(run, untrained, tmp_path):
    for estimator, seed in (("unbiased", "0"), ("unbiased", "1"), ("mean", "0")):
        flags = [*SMALL, "--steps", "1", "--model", untrained, "--seed", seed, "--estimator", estimator]
        flags += ["--run-name", estimator + seed]
        assert run("pass_at_k_pg.py", *flags).returncode == 0
    result = run("harness/report.py", "runs/unbiased0", "runs/unbiased1", "runs/mean0")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1] == "estimator=unbiased (2 seeds: runs/unbiased0 runs/unbiased1)"
    assert "estimator=mean (1 seed: runs/mean0)" in lines
    ends = [records(tmp_path / "runs" / f"unbiased{seed}")[-1]["eval"]["all"]["pass@4"][0] for seed in (0, 1)]
    assert f"-> {sum(ends) / 2:.3f}" in next(line for line in lines if "pass@4" in line)
    result = run("harness/report.py", "runs/nothing")
    assert result.returncode == 2 and result.stderr.startswith("error: no finished run is there")
    assert result.stdout == "left out runs/nothing: it is no run folder\n"
    result = run("harness/report.py", "--help")
    assert result.returncode == 0 and {"--figure", "--metric"} <= {*result.stdout.split()}


def test_show_prompt_prints_what_the_policy_reads(run, untrained, tmp_path):
    result = run("majority_pg.py", *SMALL, "--model", untrained, "--show-prompt")
    assert result.returncode == 0 and result.stdout.strip().endswith("=") and not (tmp_path / "runs").exists()


def test_a_task_for_evaluation_only(run, untrained, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2", "solution": ""}) + "\n")
    flags = [*SMALL, "--task", "math500", "--data", str(tmp_path), "--model", untrained]
    result = run("pass_at_k_pg.py", *flags)
    assert result.returncode == 2 and "no training problems here: --steps 0 evaluates" in result.stderr


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
        result = run("pass_at_k_pg.py", *flags)
    line, on = "no test.jsonl: the evaluation below is on the TRAINING problems", "TRAINING" if one_file else "held-out"
    assert result.returncode == 0 and (line in result.stdout.splitlines()) == one_file, result.stderr
    assert f"2 {on} problems; " in result.stdout and titles == [on] and save_figure is harness.report.save_figure
    if one_file:
        result = run("pass_at_k_pg.py", *flags, "--steps", "0")
        assert line not in result.stdout and "2 held-out problems; " in result.stdout


def test_a_folder_without_a_test_split_says_what_to_add(run, untrained, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "1+1=", "answer": "2"}) + "\n")
    flags = [*SMALL, "--levels", "--task", "gsm8k", "--data", str(tmp_path), "--model", untrained]
    line = f"error: the task has no held-out problems here: add test.jsonl to {tmp_path}"
    assert run("pass_at_k_pg.py", *flags).stderr.splitlines()[-1] == line


def test_events_in_the_verifier_are_summed_over_an_evaluation(run, untrained, monkeypatch, tmp_path):
    """Timeouts are never silent zeros, in evaluation either."""
    verify = arithmetic.verify
    monkeypatch.setattr(arithmetic, "verify", lambda *args: dataclasses.replace(verify(*args), counts={"timeouts": 2}))
    result = run("pass_at_k_pg.py", *SMALL, "--steps", "0", "--model", untrained)
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
