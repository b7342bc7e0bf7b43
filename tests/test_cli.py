"""The scripts as their users run them: what a run leaves, what each flag changes, what is refused, and what goes wrong
around a run, with the one line that tells it."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from runs import SCRIPTS, SMALL, of_script, save_untrained, steps_of
from test_resume import FULL, raising, sending
from transformers import AutoModelForCausalLM

import harness.policy
import harness.report
import harness.run
from harness.policy import full_disk_told
from harness.run import RunArgs
from verifiers import TASKS, BadInput, Verdict, arithmetic, learned, load_task

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
    ("--k 8 --n 4", "--n must be at least 8 (--k 8 takes that many samples), not 4"),
    ("--k 8 --n 9 --eval-n 4", "--eval-n must be at least 8"),
    ("--k 0", "--k must be at least 1, not 0"),
    ("--k 1 --n 1 --kl-coef 1", "--kl-coef needs --n 2 or more"),
    ("--max-new-tokens 64", "exceed the model's context of 64"),
]
OF_ALL = [
    ("--temperature 0", "--temperature must be a positive number, not 0.0"),
    ("--lr nan", "--lr must be a positive number, not nan"),
    ("--task sudoku", "unknown task 'sudoku': choose one of arithmetic, "),
    *((f"--task {name} --levels --data x.jsonl", f"task '{name}' makes its own problems: leave --data out")
      for name in ("suspects", "programs", "reasoning_gym/dice")),
    ("--levels 9", "no training problems at --levels 9"),
    ("--model no/such-model", "cannot load --model 'no/such-model'"),
    ("--kl-coef nan", "--kl-coef must be at least 0, not nan"),
    ("--kl-coef inf", "--kl-coef must be at least 0 and finite, not inf"),
    (f"--model tiny-{10**20}", f"cannot load --model 'tiny-{10**20}'"),
    ("--run-name a/../../b", "--run-name"),
    ("--no-chat", "no chat template: leave --no-chat out"),
    *((f"--model {name}", f"{Path(name)} does not exist") for name in ("~no_user/x", "./nope", "a/b/c")),
    ("--model ./no_test/train.jsonl", "train.jsonl is a file"),
    ("--model no_end", "has no end-of-sequence token"),
    ("--model no_tokenizer", "tokenizer.save_pretrained('no_tokenizer') writes one"),
    ("--model no_weights", "no file named model.safetensors"),
    ("--model a_weight_less", "its weights lack model.layers.0.self_attn.q_proj.weight"),
    ("--levels --task gsm8k --data no_test/train.jsonl --model tiny", "--model tiny cannot learn task 'gsm8k'"),
    ("--levels --task gsm8k --data no_test", "the task has no held-out problems here: add test.jsonl to no_test"),
    ("--levels --task math500 --data no_train", "the task has no training problems here: --steps 0 evaluates"),
    ("--estimator mode", "--estimator must be mean, unbiased, biased, maxrl or FILE:NAME, not 'mode'"),
    ("--sandbox landlock", "--sandbox does nothing without a task that runs programs"),
    *((f"--{name}=", f"--{name} is empty: give it a value, or leave it out") for name in ("resume", "data", "model")),
]  # fmt: skip

OF_SOME = [
    (PASS, "--k 1 --n 1 --estimator maxrl", "--estimator maxrl with --n 1 is zero by definition"),
    *((x, "--k 1 --estimator biased", "--estimator biased with --k 1 is zero by") for x in (PASS, MAJ)),
    (RL, "--estimator recipes/all_right.py:all_right", "recipes/all_right.py:all_right"),  # a file: pass@k's alone
    (RL, "--estimator variational --n 7", "needs --n 6 or a larger multiple of --N, not 7"),
    (RL, "--estimator variational --baseline value --n 2", "needs --n 4 or a larger multiple"),
    (RL, "--baseline value", "--baseline value is for --estimator mean and variational"),
    (RL, "--estimator rlb --verifier learned", "rlb is a closed form for --verifier environment"),
    (RL, "--log-kl --anchor-rate 2", "--anchor-rate must lie between 0 and 1, not 2.0"),
    (RL, "--k 1 --n 1 --kl-coef-end 1", "--kl-coef needs --n 2 or more"),
    (RL, "--verifier learned --verifier-model no/such", "cannot load the verifier 'no/such'"),
    (SFT, "--n 2", "--n must be more than --N 2, not 2"),
    (SFT, "--eval-N 5", "--eval-N must lie between 1 and --eval-n 4, not 5"),
    (SFT, "--likelihood exact --verifier learned", "exact is a closed form for --verifier environment"),
    (SFT, "--experts no.jsonl", "no.jsonl does not exist: --experts takes a JSONL or Parquet file, or a folder"),
    (SFT, "--N 1 --n 6", "--n does nothing without --N 2 or more"),
    (SFT, "--N 1 --n None --likelihood exact", "--likelihood does nothing without --N 2 or more"),
    (RL, "--verifier learned --verifier-model x --verifier-lr 1", "--verifier-lr does nothing without a verifier that"),
    (RL, "--verifier-model x", "--verifier-model does nothing without --verifier learned; leave it out"),
    (RL, "--kl-coef 1 --log-kl", "--log-kl does nothing without --kl-coef 0: else the KL is logged anyway"),
    (RL, "--kl-coef 1 --kl-delay 5", "--kl-delay does nothing without --kl-coef-end"),
]  # fmt: skip
REFUSED = [*((x, *case) for x in (PASS, RL) for case in OF_EACH), *((PASS, *case) for case in OF_ALL), *OF_SOME]


def without_a_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: x for name, x in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(folder, state_dict=state)


SPOILT = {  # folder -> what is done to the model in it
    "no_end": lambda folder: save_untrained(folder, eos=False),
    "no_tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a_weight_less": without_a_weight,
}


@pytest.mark.parametrize("script, flags, complaint", REFUSED)
def test_bad_input_is_one_clear_line(script, flags, complaint, run, untrained, tmp_path):
    for name in ("no_test/train.jsonl", "no_train/test.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"problem": "1+1=", "answer": "2", "solution": ""}) + "\n")
    for name in SPOILT.keys() & {*flags.split()}:
        SPOILT[name](Path(shutil.copytree(untrained, tmp_path / name)))
    stderr = run(script, *SMALL, "--model", untrained, *flags.split(), code=2).stderr
    assert of_script(script, complaint) in stderr
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


@pytest.mark.parametrize("script, flags", [(RL, "--estimator rlb"), (SFT, "--likelihood exact")])
def test_a_closed_form_for_rewards_0_and_1_refuses_others(script, flags, run, untrained, monkeypatch):
    """In a training step, behind the trial and the first evaluation."""
    verify, calls = arithmetic.verify, []

    def higher(*args):
        calls.append(args)
        verdict = verify(*args)
        return Verdict(verdict.rewards + (len(calls) > 2) / 2, verdict.votes)

    monkeypatch.setattr(arithmetic, "verify", higher)
    stderr = run(script, *SMALL, *flags.split(), "--model", untrained, code=2).stderr
    *_, line = stderr.splitlines()
    assert "is for rewards and scores 0 and 1, 'arithmetic' has others" in line
    assert "(step 0 is saved: mend it, then --resume runs/" in line and "Traceback" not in stderr


# ------------------------------------------------------------------------------------- what goes wrong around a run
def test_a_full_disk_leaves_no_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_text", raising(FULL))
    with pytest.raises(BadInput, match="no space left on the disk of runs/one/args.json"):
        harness.run.new_run_folder(RunArgs(run_name="one"), [])
    assert list(Path("runs").iterdir()) == []


def test_a_runs_folder_is_its_own_and_a_long_path_is_shortened_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = harness.run.new_run_folder(RunArgs(), ["/a" * 200 + "/model", "k4"]).name
    assert name[-16:-6] == "_model-k4-" and len(name) < 255
    monkeypatch.setattr(Path, "exists", lambda self: False)  # another run makes it in this moment
    args = RunArgs(run_name="one")
    assert [harness.run.new_run_folder(args, []).name for _ in range(2)] == ["one", "one-2"]


def test_a_hub_out_of_reach_is_asked_once_and_told_in_one_line(refused, noted, monkeypatch):
    """For a model and for a data set, whose library is then told that there is no network, for this one call."""
    asked, why = [], "(ConnectionError: [Errno -2] Name or service not known)"

    class Api:
        def repo_info(self, name, repo_type, timeout):
            asked.append((repo_type, name))
            raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # as it is elsewhere
    offline = noted(datasets, "load_dataset", lambda *_, **__: datasets.config.HF_HUB_OFFLINE)
    line = refused(PASS, *SMALL, "--model", "someone/model")
    told = f"it is neither a folder nor in the cache, and the hub cannot be reached {why}"
    assert line == f"error: cannot load --model 'someone/model' on device 'cpu': {told}"
    line = refused(PASS, *SMALL, "--levels", "--task", "gsm8k")
    assert line == f"error: cannot load openai/gsm8k from the hub {why}: give local files with --data PATH"
    assert asked == [("model", "someone/model"), ("dataset", "openai/gsm8k")]
    assert offline == [True] and not datasets.config.HF_HUB_OFFLINE


def test_a_new_head_is_no_news_to_the_user_and_a_missing_one_is_refused(untrained, capfd):
    task = load_task("arithmetic")
    head = learned.load_verifier(untrained, task, new_head=True).model.score.weight
    assert head.shape == (1, 16)
    told = capfd.readouterr()
    assert "MISSING" not in told.out + told.err and "score" not in told.out + told.err
    with pytest.raises(BadInput, match="cannot load the verifier .*: ValueError: its weights lack score.weight"):
        learned.load_verifier(untrained, task)


OF_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
OF_TORCH.__context__ = FULL
OF_SAFETENSORS = Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [FULL, OF_SAFETENSORS, OF_TORCH])
def test_a_full_disk_in_the_words_of_each_library(error, tmp_path):
    """Of a policy and a warm start, of which nothing is left; of a checkpoint and a log: test_resume.py."""
    with pytest.raises(BadInput, match=f"no space left on the disk of {tmp_path}/policy"):
        harness.policy.write_atomically(tmp_path / "policy", raising(error))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Permission denied"), full_disk_told(tmp_path):  # other errors pass as they are
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


STOPPED = "stopped: give the same command again, or --resume the folder that it was writing to"
TOO_MUCH = "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize("where, action, code, line", [
    ("load_policy", sending(signal.SIGINT), 130, STOPPED), ("Run.evaluate", sending(signal.SIGINT), 130, STOPPED),
    ("load_policy", raising(torch.OutOfMemoryError(TOO_MUCH)), 2, f"error: {TOO_MUCH}"),
])  # fmt: skip
def test_the_end_before_the_first_step_is_one_line(where, action, code, line, run, skilled, monkeypatch):
    monkeypatch.setattr(f"harness.run.{where}", action)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    ended = run(PASS, *SMALL, "--model", skilled)
    signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stderr) == (code, line + "\n")


def test_track_calls_wandb_before_the_writer_is_made(run, refused, skilled, monkeypatch):
    """In the first process alone, and only where it is asked for; where it is not installed that is told."""
    calls, writer = [], SimpleNamespace(add_scalar=lambda name, _, step: calls.append((name, step)), flush=lambda: None)
    made = SimpleNamespace(SummaryWriter=lambda folder: calls.append(("writer", str(folder))) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    flags = [*SMALL, "--model", skilled, "--run-name", "one"]
    run(PASS, *flags, "--steps", "0", code=0)
    assert calls == []
    line = refused(PASS, *flags, "--track")
    assert line == "error: --track needs what is not installed: pip install wandb tensorboard"
    run(PASS, *flags, "--run-name", "board", "--tensorboard", code=0)
    assert calls[0] == ("writer", "runs/board") and ("reward", 2) in calls
    calls.clear()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(("init", options))))
    run(PASS, *flags, "--run-name", "two", "--track", code=0)
    (name, options), writes, *scalars = calls
    assert name == "init" and options["sync_tensorboard"] is True and options["name"] == "two"
    assert options["config"]["k"] == 2 and writes == ("writer", "runs/two") and ("reward", 2) in scalars
    monkeypatch.setattr(harness.run, "world", lambda: (1, 1))
    run(PASS, "--resume", "runs/two", code=0)
    assert len(calls) == 2 + len(scalars)
