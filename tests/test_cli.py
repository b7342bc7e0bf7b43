"""The scripts as their users run them: what a run leaves, what each flag changes, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import SCRIPTS, SMALL, of_script, save_untrained, steps_of
from transformers import AutoModelForCausalLM

import harness.report
import harness.run
from verifiers import TASKS, Verdict, arithmetic

PASS, MAJ, RL, SFT = SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_ends_with_a_table_and_curves(script, uninterrupted):
    """test_wiring.py has what it logs, test_policy.py the policy that it leaves."""
    folder, _, out = uninterrupted(script)
    assert ("maj@2" if script.startswith("maj") else "pass@2") in out and " -> " in out
    assert (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_size_that_a_flag_names_is_reported(script, run, untrained):
    """The sizes 24, 3 and 5 are no powers of two."""
    flags = [*"--task arithmetic --steps 0 --k 3 --n 9 --eval-n 24 --eval-problems 1 --model".split(), untrained]
    size, flags = (5, [*flags, "--eval-N", "5"]) if script == SFT else (3, flags)
    out, metric = run(script, *flags, code=0).stdout, "maj" if script.startswith("maj") else "pass"
    assert {f"{metric}@{size}", "pass@24"} <= {line.split()[1] for line in out.splitlines() if line.startswith("all ")}
    (folder,) = Path("runs").iterdir()  # an evaluation trains nothing and leaves no policy
    assert steps_of(folder) == [] and not (folder / "policy").exists() and "had a signal" not in out


def test_a_model_without_a_pad_token_runs(run, tmp_path):
    """Filler is masked, never read: a pad token has no use here."""
    run(PASS, *SMALL, "--model", save_untrained(tmp_path / "model", pad=False), code=0)


# What is checked for all scripts, and called --k or --N as they have it; and what some check. Files: see the test.
OF_EACH = [
    (["--k", "8", "--n", "4"], "--n must be at least 8 (--k 8 takes that many samples), not 4"),
    (["--k", "8", "--n", "9", "--eval-n", "4"], "--eval-n must be at least 8"),
    (["--k", "0"], "--k must be at least 1, not 0"),
    (["--k", "1", "--n", "1", "--kl-coef", "1"], "--kl-coef needs --n 2 or more"),
    (["--max-new-tokens", "64"], "exceed the model's context of 64"),
    (["--bogus", "1"], "bogus"),
]
OF_ALL = [
    (["--temperature", "0"], "--temperature must be a positive number, not 0.0"),
    *(([f"--{name}", ""], f"--{name} is empty: give it a value, or leave it out")
      for name in ("resume", "data", "model", "task", "run-name")),
    (["--lr", "nan"], "--lr must be a positive number, not nan"),
    (["--task", "sudoku"], "unknown task 'sudoku': choose one of arithmetic, "),
    *((["--task", name, "--levels", "--data", "x.jsonl"], f"task '{name}' makes its own problems: leave --data out")
      for name in ("arithmetic", "suspects")),
    (["--levels", "9"], "no training problems at --levels 9"),
    (["--model", "no/such-model"], "cannot load --model 'no/such-model'"),
    (["--kl-coef", "nan"], "--kl-coef must be at least 0, not nan"),
    (["--kl-coef", "inf"], "--kl-coef must be at least 0 and finite, not inf"),
    (["--model", f"tiny-{10**20}"], f"cannot load --model 'tiny-{10**20}'"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
    (["--device", "tpu"], "invalid choice 'tpu'"),
    (["--run-name", "a/../../b"], "--run-name"),
    (["--no-chat"], "no chat template: leave --no-chat out"),
    *((["--model", name], f"{Path(name)} does not exist") for name in ("/tmp/nope", "./nope", "a/b/c")),
    (["--model", "./no_test/train.jsonl"], "train.jsonl is a file"),
    (["--model", "no_end"], "has no end-of-sequence token"),
    (["--model", "no_tokenizer"], "tokenizer.save_pretrained('no_tokenizer') writes one"),
    (["--model", "torn_weights"], "cannot load --model 'torn_weights'"),
    (["--model", "no_weights"], "no file named model.safetensors"),
    (["--model", "a_weight_less"], "its weights lack model.layers.0.self_attn.q_proj.weight"),
    (["--levels", "--task", "gsm8k", "--data", "no_test/train.jsonl", "--model", "tiny"],
     "--model tiny cannot learn task 'gsm8k'"),
    (["--levels", "--task", "gsm8k", "--data", "no_test"],
     "the task has no held-out problems here: add test.jsonl to no_test"),
    (["--levels", "--task", "math500", "--data", "no_train"],
     "the task has no training problems here: --steps 0 evaluates on held-out ones"),
    (["--estimator", "mode"], "--estimator must be mean, unbiased, biased, maxrl or FILE:NAME, not 'mode'"),
    (["--sandbox", "landlock"], "--sandbox does nothing without a task that runs programs"),
]  # fmt: skip

OF_SOME = [
    (PASS, ["--k", "1", "--n", "1", "--estimator", "maxrl"], "--estimator maxrl with --n 1 is zero by definition"),
    *((x, ["--k", "1", "--estimator", "biased"], "--estimator biased with --k 1 is zero by") for x in (PASS, MAJ)),
    (RL, ["--estimator", "recipes/all_right.py:all_right"], "recipes/all_right.py:all_right"),  # a file: pass@k's alone
    (RL, ["--estimator", "variational", "--n", "7"], "needs --n 6 or a larger multiple of --N, not 7"),
    (RL, ["--estimator", "variational", "--baseline", "value", "--n", "2"], "needs --n 4 or a larger multiple"),
    (RL, ["--baseline", "value"], "--baseline value is for --estimator mean and variational"),
    (RL, ["--estimator", "rlb", "--verifier", "learned"], "rlb is a closed form for --verifier environment"),
    (RL, ["--log-kl", "--anchor-rate", "2"], "--anchor-rate must lie between 0 and 1, not 2.0"),
    (RL, ["--k", "1", "--n", "1", "--kl-coef-end", "1"], "--kl-coef needs --n 2 or more"),
    (RL, ["--kl-coef-end", "1", "--kl-delay", "-1"], "--kl-delay must be at least 0"),
    (RL, ["--estimator", "mean", "--baseline", "value", "--value-lr", "0"], "--value-lr must be a positive number"),
    (RL, ["--verifier", "learned", "--verifier-model", "no/such"], "cannot load the verifier 'no/such'"),
    (SFT, ["--experts", ""], "--experts is empty"),
    (SFT, ["--n", "2"], "--n must be more than --N 2, not 2"),
    (SFT, ["--eval-N", "5"], "--eval-N must lie between 1 and --eval-n 4, not 5"),
    (SFT, ["--likelihood", "exact", "--verifier", "learned"], "exact is a closed form for --verifier environment"),
    (SFT, ["--experts", "no.jsonl"], "no.jsonl does not exist: --experts takes a JSONL or Parquet file, or a folder"),
    (SFT, ["--N", "1", "--n", "6"], "--n does nothing without --N 2 or more"),
    (SFT, ["--N", "1", "--n", "None", "--likelihood", "exact"], "--likelihood does nothing without --N 2 or more"),
    (RL, ["--verifier", "learned", "--verifier-model", "x", "--verifier-lr", "1"],
     "--verifier-lr does nothing without a verifier that is trained here"),
    (RL, ["--verifier-model", "x"], "--verifier-model does nothing without --verifier learned; leave it out"),
    (RL, ["--kl-coef", "1", "--log-kl"], "--log-kl does nothing without --kl-coef 0: else the KL is logged anyway"),
    (RL, ["--kl-coef", "1", "--kl-delay", "5"], "--kl-delay does nothing without --kl-coef-end"),
]  # fmt: skip
REFUSED = [*((x, *case) for x in (PASS, RL) for case in OF_EACH), *((PASS, *case) for case in OF_ALL), *OF_SOME]


def without_a_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: x for name, x in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(folder, state_dict=state)


SPOILT = {  # folder -> what is done to the model in it
    "no_end": lambda folder: save_untrained(folder, eos=False),
    "no_tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "torn_weights": lambda folder: os.truncate(folder / "model.safetensors", 500),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a_weight_less": without_a_weight,
}


@pytest.mark.parametrize("script, flags, complaint", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_clear_line(script, flags, complaint, run, untrained, tmp_path):
    for name in ("no_test/train.jsonl", "no_train/test.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"problem": "1+1=", "answer": "2", "solution": ""}) + "\n")
    for name in SPOILT.keys() & {*flags}:
        SPOILT[name](Path(shutil.copytree(untrained, tmp_path / name)))
    stderr = run(script, *SMALL, "--model", untrained, *flags, code=2).stderr
    assert of_script(script, complaint) in stderr and "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1 or not stderr.startswith("error:")  # the parser's own has a frame
    assert not (tmp_path / "runs").exists()


def test_the_sandbox_is_a_flag_of_the_tasks_that_run_programs():
    _, used = harness.run.IDLE_WITHOUT["sandbox"]
    takes_it = {name for name in TASKS if used(SimpleNamespace(task=name))}
    assert takes_it == {"programs", "humaneval", "mbpp", "mbpp_sanitized", "code_contests", "taco"}


def test_the_papers_preset_and_flags_beside_it(run, untrained, tmp_path):
    flags = "--preset paper --task arithmetic --N 2 --steps 0 --lr 1e-5 --eval-n 2 --eval-problems 1 --model".split()
    run(RL, *flags, untrained, code=0)
    (folder,) = (tmp_path / "runs").iterdir()
    expected = {"lr": 1e-5, "prompts_per_step": 32, "warm_up_steps": 100, "anchor_rate": 0.01, "kl_coef": 1.0,
                "kl_coef_end": 0.075, "kl_delay": 10, "kl_anneal_steps": 2500, "value_lr": 1e-5}  # fmt: skip
    assert expected.items() <= json.loads((folder / "args.json").read_text()).items()


@pytest.mark.parametrize("one_file", [True, False])
def test_an_evaluation_on_training_problems_says_so(one_file, run, untrained, tmp_path, monkeypatch):
    """It says so in a line, in the table's title and in the figure's, but not where nothing is trained."""
    rows = [json.dumps({"problem": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(3)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(rows if one_file else rows[name == "test.jsonl" :]))
    data = tmp_path / "train.jsonl" if one_file else tmp_path
    flags = "--task gsm8k --steps 1 --k 2 --n 2 --prompts-per-step 1 --eval-n 2 --eval-problems 2 --max-new-tokens 2"
    flags = [*flags.split(), "--data", str(data), "--model", untrained]
    titles = []
    monkeypatch.setattr(harness.report, "save_figure", lambda *args: titles.append(args[-1]))
    out = run(PASS, *flags, code=0).stdout
    line, on = "no test.jsonl: the evaluation below is on the TRAINING problems", "TRAINING" if one_file else "held-out"
    assert (line in out.splitlines()) == one_file and f"2 {on} problems; " in out and titles == [on]
    if one_file:
        out = run(PASS, *flags, "--steps", "0").stdout
        assert line not in out and "2 held-out problems; " in out


@pytest.mark.parametrize("first", [1, 3], ids=["at once", "in a training step"])
@pytest.mark.parametrize("script, flags", [(RL, ["--estimator", "rlb"]), (SFT, ["--likelihood", "exact"])])
def test_a_closed_form_for_rewards_0_and_1_refuses_others(script, flags, first, run, untrained, monkeypatch):
    verify, calls = arithmetic.verify, []

    def higher(*args):
        calls.append(args)
        verdict = verify(*args)
        return Verdict(verdict.rewards + 0.5, verdict.votes) if len(calls) >= first else verdict

    monkeypatch.setattr(arithmetic, "verify", higher)
    stderr = run(script, *SMALL, *flags, "--model", untrained, code=2).stderr
    *_, line = stderr.splitlines()
    assert "is for rewards and scores 0 and 1, 'arithmetic' has others" in line
    assert "(step 0 is saved: mend it, then --resume runs/" in line and "Traceback" not in stderr
