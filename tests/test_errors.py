"""What goes wrong around a run, and the one line that tells it: models that are not there, full disks, Ctrl-C."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL, outcome
from transformers import AutoModelForCausalLM

import harness.policy
import harness.run
import verifiers.hub
import verifiers.rows
from harness.policy import full_disk_told
from harness.run import RunArgs
from verifiers import BadInput, load_task

PASS, RL, SFT = "pass_at_k_pg.py", "bon_rl.py", "bon_sft.py"


def one_line(result) -> str:
    """The line in which a run ended that could not go on."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Writing model")]
    return line


def test_a_folder_that_another_run_makes_in_this_moment_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    args = RunArgs(run_name="one")
    assert [harness.run.new_run_folder(args, []).name for _ in range(2)] == ["one", "one-2"]


def test_a_long_path_is_shortened_in_a_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = harness.run.new_run_folder(RunArgs(), ["/a" * 200 + "/model", "k4"]).name
    assert name[-16:-6] == "_model-k4-" and len(name) < 255


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="2"):
        harness.run.run_cli(main, RunArgs)
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2 GiB\n"


# --- Models ---


def without_a_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: x for name, x in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(folder, state_dict=state)


SPOILT = {
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
                     "it holds no tokenizer that can be read (.*): tokenizer.save_pretrained('{}') writes one"),
    "torn weights": (lambda folder: os.truncate(folder / "model.safetensors", 500), ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a weight lacks": (without_a_weight, "its weights lack model.layers.0.self_attn.q_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_folder_that_is_spoilt(name, run, untrained, tmp_path):
    folder, (spoil, complaint) = Path(shutil.copytree(untrained, tmp_path / "model")), SPOILT[name]
    spoil(folder)
    line = one_line(run(PASS, *SMALL, "--model", str(folder)))
    assert line.startswith(f"error: cannot load --model '{folder}'")
    assert all(part in line for part in complaint.format(folder).split(".*"))


def test_a_folder_that_is_not_there(run):
    for name in ("/tmp/nope", "./nope", "a/b/c"):
        assert one_line(run(PASS, *SMALL, "--model", name)).endswith(f"{Path(name)} does not exist")
    Path("file.bin").write_text("")
    assert one_line(run(PASS, *SMALL, "--model", "./file.bin")).endswith("file.bin is a file")


def test_a_hub_out_of_reach_is_asked_once_and_told_in_one_line(run, monkeypatch):
    asked = []

    class Api:
        def repo_info(self, name, **options):
            asked.append((name, options["repo_type"]))
            raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    line = one_line(run(PASS, *SMALL, "--model", "someone/model"))
    assert asked == [("someone/model", "model")]
    assert line.endswith("the hub cannot be reached (ConnectionError: [Errno -2] Name or service not known)")
    assert line.startswith("error: cannot load --model 'someone/model'") and "neither a folder nor in the cache" in line


def test_a_new_head_is_no_news_to_the_user_and_a_missing_one_is_refused(untrained, capfd):
    task = load_task("arithmetic")
    head = verifiers.learned.load_verifier(untrained, task, new_head=True).model.score.weight
    assert head.shape == (1, 16)
    told = capfd.readouterr()
    assert "MISSING" not in told.out + told.err and "score" not in told.out + told.err
    with pytest.raises(BadInput, match="cannot load the verifier .*: ValueError: its weights lack score.weight"):
        verifiers.learned.load_verifier(untrained, task)


# --- Data ---


def test_experts_are_no_data_and_tell_of_no_splits(run, skilled):
    task = load_task("arithmetic")
    problems = [problem for problem in task.train if problem.level == 1][:8]
    rows = [{"problem": problem.prompt, "response": problem.answer} for problem in problems]
    Path("experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(SFT, *SMALL, "--model", skilled, "--experts", "experts.jsonl")
    assert result.returncode == 0 and "split" not in result.stdout + result.stderr
    line = one_line(run(SFT, *SMALL, "--model", skilled, "--experts", "none.jsonl"))
    assert line == "error: none.jsonl does not exist: --experts takes a JSONL or Parquet file, or a folder of them"


def test_levels_that_are_no_number_are_told(tmp_path, capsys):
    levels = ["hard", 3, None, "Level ?"]
    rows = [{"problem": f"{i}?", "answer": str(i), "level": level} for i, level in enumerate(levels)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("math", str(tmp_path))
    assert [problem.level for problem in task.train] == [None, 3, None, None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path}, train: 2 levels that are no number, such as 'hard': these problems have no level"


# --- Disks ---


TELLS = {
    "Python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("library", [*TELLS, "torch"])
def test_a_full_disk_in_the_words_of_each_library(library, tmp_path):
    """Of a policy and a warm start, of which nothing is left; of a checkpoint and a log: test_resume.py."""

    def write(folder):
        if library != "torch":
            raise TELLS[library]
        try:
            raise TELLS["Python"]
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(BadInput, match=f"no space left on the disk of {tmp_path}/policy"):
        harness.policy.write_atomically(tmp_path / "policy", write)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(OSError, match="Permission denied"), full_disk_told(tmp_path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_torn_checkpoint_is_one_line(run, skilled, tmp_path):
    flags = [*SMALL, "--model", skilled, "--run-name", "one"]
    assert run(PASS, *flags).returncode == 0
    path, whole = tmp_path / "runs/one/checkpoint.pt", outcome(tmp_path / "runs/one")
    for content in (path.read_bytes()[:5000], b"", b"no checkpoint"):
        path.write_bytes(content)
        line = one_line(run(PASS, "--resume", "runs/one"))
        assert line.startswith("error: runs/one/checkpoint.pt cannot be read (") and "delete it to begin anew" in line
        assert outcome(tmp_path / "runs/one") == whole  # the logs are as they were
    path.unlink()
    assert run(PASS, "--resume", "runs/one").returncode == 0 and outcome(tmp_path / "runs/one") == whole


# --- Ctrl-C ---


@pytest.mark.parametrize("where", ["harness.run.load_policy", "harness.run.Run.evaluate"])
def test_ctrl_c_before_the_first_step_is_one_line(where, run, skilled, monkeypatch):
    monkeypatch.setattr(where, lambda *args: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    result = run(PASS, *SMALL, "--model", skilled)
    signal.signal(signal.SIGINT, before)
    assert result.returncode == 130
    assert result.stderr == "stopped: give the same command again, or --resume the folder that it was writing to\n"


# --- Weights & Biases ---


@pytest.mark.parametrize("rank", [0, 1])
def test_track_calls_wandb_before_the_writer_is_made_in_the_first_process_alone(rank, run, skilled, monkeypatch):
    calls = []

    def writer(folder):
        calls.append(("writer", str(folder)))
        return SimpleNamespace(add_scalar=lambda name, value, step: calls.append((name, step)), flush=lambda: None)

    wandb = SimpleNamespace(init=lambda **options: calls.append(("init", options)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    if rank:
        monkeypatch.setattr(harness.run, "world", lambda: (1, 1))
        monkeypatch.setattr(harness.run, "new_run_folder", lambda args, parts: Path("runs/second"))
        monkeypatch.setattr(harness.run, "all_gather", lambda value: [Path("runs/second") if value is None else value])
        args = __import__("pass_at_k_pg").Args(task="arithmetic", model=skilled, track=True, n=4, k=2, eval_n=4)
        assert harness.run.Run(args).writer is None and calls == []
        return
    result = run(PASS, *SMALL, "--model", skilled, "--run-name", "one", "--track")
    assert result.returncode == 0, result.stderr
    (name, options), writer, *scalars = calls
    assert name == "init" and options["sync_tensorboard"] is True and options["name"] == "one"
    assert options["config"]["k"] == 2 and writer == ("writer", "runs/one") and ("reward", 2) in scalars


def test_without_track_wandb_is_not_imported_and_where_it_is_not_installed_that_is_told(run, skilled, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    assert run(PASS, *SMALL, "--model", skilled, "--steps", "0").returncode == 0
    line = one_line(run(PASS, *SMALL, "--model", skilled, "--track"))
    assert line == "error: --track needs what is not installed: pip install wandb tensorboard"
