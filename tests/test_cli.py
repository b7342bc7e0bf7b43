"""The scripts as their users run them, on an untrained tiny policy.

One run of each is a subprocess; the others run the script as __main__ in this process, which saves importing torch.
"""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import common
import harness.policy
from verifiers import arithmetic

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "2", "--k", "2", "--n", "4", "--prompts-per-step", "4", "--eval-n", "4", "--eval-problems", "2"]
SCRIPTS = ["pass_at_k_pg.py", "majority_pg.py", "bon_rl.py", "bon_sft.py"]


def of_script(script: str, text: str) -> str:
    """The Best-of-N scripts say N where the others say k."""
    return re.sub("--k\\b", "--N", text) if script.startswith("bon") else text


def save_untrained(folder: Path, eos: bool = True, pad: bool = True) -> str:
    tokenizer = harness.policy.tiny_tokenizer()
    if not eos:
        tokenizer.eos_token = None
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, bos_token_id=None,
                         pad_token_id=0 if pad else None, eos_token_id=1 if eos else None)  # fmt: skip
    harness.policy.save_policy(common.Policy(LlamaForCausalLM(config), tokenizer, [1]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *flags) in an empty folder -> returncode, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def result(script: str, *flags: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [script, *(of_script(script, flag) for flag in flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            returncode = 0
        except SystemExit as stop:
            returncode = stop.code
        out = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=out.out, stderr=out.err)

    return result


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_start_to_end(script, model, tmp_path):
    flags = [of_script(script, flag) for flag in SMALL]
    command = [sys.executable, str(ROOT / script), *flags, "--model", model, "--eval-every", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "args.json").read_text())["n"] == 4
    metric = "maj@2" if script.startswith("maj") else "pass@2"
    log = records(folder)
    assert [r["step"] for r in log if "eval" in r] == [0, 1, 2] and [r["step"] for r in log if "reward" in r] == [1, 2]
    keys = {"reward", "loss", "grad_norm", "signal"} | ({metric} if script != "bon_sft.py" else {"expert_reward"})
    assert all(keys <= r.keys() for r in log if "reward" in r)
    assert metric in result.stdout and " -> " in result.stdout
    assert (folder / "curves.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(folder / "policy"), AutoTokenizer.from_pretrained(folder / "policy")


def test_equal_arguments_give_equal_metrics_and_another_folder(run, model, tmp_path):
    for _ in range(2):
        assert run("pass_at_k_pg.py", *SMALL, "--model", model).returncode == 0
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda folder: len(folder.name))
    assert second.name == f"{first.name}-2"
    without_speed = [[{**r, "tokens_per_s": 0} for r in records(folder)] for folder in (first, second)]
    assert without_speed[0] == without_speed[1]


@pytest.mark.parametrize("flags", [["--kl-coef", "0.1"], ["--epochs", "2"], ["--steps", "0"], ["--estimator", "mean"],
                                   ["--gradient-checkpointing"], ["--estimator", "biased", "--micro-batch-tokens", "1"],
                                   ["--levels", "1", "3", "--temperature", "0.7"]], ids=" ".join)  # fmt: skip
def test_flags(run, flags, model, tmp_path):
    result = run("pass_at_k_pg.py", *SMALL, *flags, "--model", model)
    assert result.returncode == 0, result.stderr


def test_a_model_without_a_pad_token_runs(run, tmp_path):
    """Filler is masked, never read: a pad token has no use here."""
    result = run("pass_at_k_pg.py", *SMALL, "--model", save_untrained(tmp_path / "model", pad=False))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--k", "8", "--n", "4"], "--n must be at least 8 (--k 8 takes that many samples), not 4"),
        (["--k", "8", "--n", "8", "--eval-n", "4"], "--eval-n must be at least 8"),
        (["--k", "0"], "--k must be at least 1, not 0"),
        (["--steps", "-1"], "--steps must be at least 0"),
        (["--temperature", "0"], "--temperature must be a positive number, not 0.0"),
        (["--lr", "nan"], "--lr must be a positive number, not nan"),
        (["--k", "1", "--n", "1", "--kl-coef", "1"], "--kl-coef needs --n 2 or more"),
        (["--task", "sudoku"], "unknown task 'sudoku': choose one of arithmetic, "),
        (["--data", "x.jsonl"], "makes its own problems: leave --data out"),
        (["--levels", "9"], "no training problems at --levels 9"),
        (["--model", "no/such-model"], "cannot load --model 'no/such-model'"),
        (["--max-new-tokens", "64"], "exceed the model's context of 64"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--device", "tpu"], "on device 'tpu'"),
        (["--run-name", "a/../../b"], "--run-name"),
        (["--estimator", "best"], "best"),
        (["--bogus", "1"], "bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(run, script, flags, complaint, model, tmp_path):
    if script == "bon_sft.py" and {"--kl-coef", "--estimator"} & {*flags}:
        complaint = flags[-2]  # an option that it does not have
    result = run(script, *SMALL, "--model", model, *flags)
    assert result.returncode == 2
    assert of_script(script, complaint) in result.stderr and "Traceback" not in result.stderr
    if result.stderr.startswith("error:"):  # ours; the parser's own has a frame
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


RL, SFT = "bon_rl.py", "bon_sft.py"


@pytest.mark.parametrize(
    "script, flags, complaint",
    [
        (RL, ["--estimator", "variational"], "--estimator variational needs --n 6 or a larger multiple of --N, not 4"),
        (RL, ["--estimator", "variational", "--n", "7"], "needs --n 6 or a larger multiple of --N, not 7"),
        (RL, ["--estimator", "variational", "--baseline", "value", "--n", "2"], "needs --n 4 or a larger multiple"),
        (RL, ["--baseline", "value"], "--baseline value is for --estimator mean and variational"),
        (RL, ["--estimator", "rlb", "--verifier", "learned"], "rlb is a closed form for --verifier environment"),
        (RL, ["--anchor-rate", "2"], "--anchor-rate must lie between 0 and 1, not 2.0"),
        (RL, ["--kl-delay", "-1"], "--kl-delay must be at least 0"),
        (RL, ["--value-lr", "0"], "--value-lr must be a positive number"),
        (RL, ["--eval-temperatures", "0.5", "0"], "--eval-temperatures must be positive numbers"),
        (RL, ["--preset", "large"], "large"),
        (RL, ["--verifier", "learned", "--verifier-model", "no/such"], "cannot load the verifier 'no/such'"),
        (SFT, ["--n", "2"], "--n must be more than --N 2, not 2"),
        (SFT, ["--eval-N", "5"], "--eval-N must lie between 1 and --eval-n 4, not 5"),
        (SFT, ["--likelihood", "exact", "--verifier", "learned"], "exact is a closed form for --verifier environment"),
        (SFT, ["--experts", "no.jsonl"], "no.jsonl does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_best_of_n_is_one_clear_line(run, script, flags, complaint, model, tmp_path):
    test_bad_input_is_one_clear_line(run, script, flags, complaint, model, tmp_path)


@pytest.mark.parametrize(
    "script, flags",
    [
        (RL, ["--estimator", "variational", "--n", "6", "--kl-coef", "1", "--kl-coef-end", "0.1"]),
        (RL, ["--estimator", "variational", "--baseline", "value", "--warm-up-steps", "2"]),
        (RL, ["--estimator", "mean", "--baseline", "value", "--epochs", "2"]),
        (RL, ["--estimator", "rlb"]),
        (RL, ["--estimator", "rlb-positive", "--eval-temperatures"]),
        (RL, ["--estimator", "rlb-all", "--steps", "0"]),
        (SFT, ["--likelihood", "exact"]),
        (SFT, ["--N", "1", "--eval-N", "2"]),
        (SFT, ["--steps", "0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_best_of_n(run, script, flags, model):
    result = run(script, *SMALL, *flags, "--model", model)
    assert result.returncode == 0, result.stderr


def test_the_papers_preset_and_flags_beside_it(run, model, tmp_path):
    flags = ["--preset", "paper", "--N", "2", "--steps", "1", "--lr", "1e-5", "--eval-n", "2", "--eval-problems", "1"]
    result = run(RL, *flags, "--model", model)
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
    result = run("pass_at_k_pg.py", *SMALL, "--task", "gsm8k", "--data", str(tmp_path / "train.jsonl"))
    assert result.returncode == 2 and "--model tiny cannot learn task 'gsm8k'" in result.stderr


def test_bandit(run, tmp_path):
    result = run("bandit.py", "--seeds", "20", "--steps", "40")
    assert result.returncode == 0, result.stderr
    assert "B1: the mean gradient" in result.stdout and (tmp_path / "runs/bandit.png").stat().st_size > 10_000
    result = run("bandit.py", "--k", "1")
    assert result.returncode == 2 and result.stderr.strip() == "error: --k must be at least 2, not 1"


def test_compare_averages_over_seeds(run, model, tmp_path):
    for estimator, seed in (("unbiased", "0"), ("unbiased", "1"), ("mean", "0")):
        flags = [*SMALL, "--model", model, "--seed", seed, "--estimator", estimator, "--run-name", estimator + seed]
        assert run("pass_at_k_pg.py", *flags).returncode == 0
    result = run("harness/report.py", "runs/unbiased0", "runs/unbiased1", "runs/mean0")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "estimator=unbiased  (2 seeds)" and "estimator=mean  (1 seeds)" in lines
    ends = [records(tmp_path / "runs" / f"unbiased{seed}")[-1]["eval"]["all"]["pass@4"][0] for seed in (0, 1)]
    assert f"-> {sum(ends) / 2:.3f}" in next(line for line in lines if "pass@4" in line)
    result = run("harness/report.py", "runs/nothing")
    assert result.returncode.startswith("error: runs/nothing is not a run folder")


def test_show_prompt_prints_what_the_policy_reads(run, model, tmp_path):
    result = run("majority_pg.py", *SMALL, "--model", model, "--show-prompt")
    assert result.returncode == 0 and result.stdout.strip().endswith("=") and not (tmp_path / "runs").exists()


def test_a_task_for_evaluation_only(run, model, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2", "solution": ""}) + "\n")
    flags = [*SMALL, "--task", "math500", "--data", str(tmp_path), "--model", model]
    result = run("pass_at_k_pg.py", *flags)
    assert result.returncode == 2 and "--steps 0" in result.stderr


def test_events_in_the_verifier_are_summed_over_an_evaluation(run, model, monkeypatch, tmp_path):
    """Timeouts are never silent zeros, in evaluation either."""
    verify = arithmetic.verify
    monkeypatch.setattr(arithmetic, "verify", lambda *args: dataclasses.replace(verify(*args), counts={"timeouts": 2}))
    result = run("pass_at_k_pg.py", *SMALL, "--steps", "0", "--model", model)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert records(folder)[0]["timeouts"] == 2


@pytest.mark.parametrize(
    "script, flags", [("bon_rl.py", ["--estimator", "rlb"]), ("bon_sft.py", ["--likelihood", "exact"])]
)
def test_a_closed_form_for_rewards_0_and_1_refuses_others(script, flags, run, model, monkeypatch):
    verify = arithmetic.verify
    monkeypatch.setattr(
        arithmetic, "verify", lambda *args: dataclasses.replace(v := verify(*args), rewards=v.rewards + 0.5)
    )
    result = run(script, *SMALL, *flags, "--model", model)
    assert result.returncode == 2 and "is for rewards 0 and 1, task 'arithmetic' has others" in result.stderr
