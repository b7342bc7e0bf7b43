"""What goes wrong around a run, and the one line that tells it: models that are not there, full disks, Ctrl-C."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL

import harness.policy
import harness.run
import pass_at_k_pg
import verifiers.hub
import verifiers.rows
from harness.policy import full_disk_told
from harness.run import RunArgs
from verifiers import BadInput, load_task

PASS = "pass_at_k_pg.py"


def test_a_runs_folder_is_its_own_and_a_long_path_is_shortened_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = harness.run.new_run_folder(RunArgs(), ["/a" * 200 + "/model", "k4"]).name
    assert name[-16:-6] == "_model-k4-" and len(name) < 255
    monkeypatch.setattr(Path, "exists", lambda self: False)  # another run makes it in this moment
    args = RunArgs(run_name="one")
    assert [harness.run.new_run_folder(args, []).name for _ in range(2)] == ["one", "one-2"]


def test_a_full_disk_leaves_no_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(TELLS["Python"]))
    with pytest.raises(BadInput, match="no space left on the disk of runs/one/args.json"):
        harness.run.new_run_folder(RunArgs(run_name="one"), [])
    assert list(Path("runs").iterdir()) == []


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="2"):
        harness.run.run_cli(main, RunArgs)
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2 GiB\n"


def test_a_hub_out_of_reach_is_asked_once_and_told_in_one_line(refused, monkeypatch):
    asked = []

    class Api:
        def repo_info(self, name, **options):
            asked.append((name, options["repo_type"]))
            raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    line = refused(PASS, *SMALL, "--model", "someone/model")
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


def test_levels_that_are_no_number_are_told(tmp_path, capsys):
    levels = ["hard", 3, None, "Level ?"]
    rows = [{"problem": f"{i}?", "answer": str(i), "level": level} for i, level in enumerate(levels)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [problem.level for problem in load_task("math", str(tmp_path)).train] == [None, 3, None, None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path}, train: 2 levels that are no number, such as 'hard': these problems have no level"


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
    with pytest.raises(OSError, match="Permission denied"), full_disk_told(tmp_path):  # other errors pass as they are
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("where", ["harness.run.load_policy", "harness.run.Run.evaluate"])
def test_ctrl_c_before_the_first_step_is_one_line(where, run, skilled, monkeypatch):
    monkeypatch.setattr(where, lambda *args: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    ended = run(PASS, *SMALL, "--model", skilled)
    signal.signal(signal.SIGINT, before)
    line = "stopped: give the same command again, or --resume the folder that it was writing to\n"
    assert (ended.returncode, ended.stderr) == (130, line)


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
    monkeypatch.setattr(harness.run, "all_gather", lambda value: [Path("runs/two") if value is None else value])
    args = pass_at_k_pg.Args(task="arithmetic", model=skilled, track=True, n=4, k=2, eval_n=4, eval_problems=1)
    second = harness.run.Run(args)
    monkeypatch.setattr(harness.run, "all_gather", lambda value: [value])
    next(second.steps(lambda verdict: {"pass@1": verdict.rewards.mean(-1)}, ""))
    assert second.writer is None and len(calls) == 2 + len(scalars)
