"""What goes wrong around a run, and the one line that tells it: models that are not there, full disks, Ctrl-C."""

import errno
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL
from test_resume import raising, sending

import harness.policy
import harness.run
from harness.policy import full_disk_told
from harness.run import RunArgs
from verifiers import BadInput, learned, load_task

PASS = "pass_at_k_pg.py"


def test_a_runs_folder_is_its_own_and_a_long_path_is_shortened_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = harness.run.new_run_folder(RunArgs(), ["/a" * 200 + "/model", "k4"]).name
    assert name[-16:-6] == "_model-k4-" and len(name) < 255
    monkeypatch.setattr(Path, "exists", lambda self: False)  # another run makes it in this moment
    args = RunArgs(run_name="one")
    assert [harness.run.new_run_folder(args, []).name for _ in range(2)] == ["one", "one-2"]


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
    head = learned.load_verifier(untrained, task, new_head=True).model.score.weight
    assert head.shape == (1, 16)
    told = capfd.readouterr()
    assert "MISSING" not in told.out + told.err and "score" not in told.out + told.err
    with pytest.raises(BadInput, match="cannot load the verifier .*: ValueError: its weights lack score.weight"):
        learned.load_verifier(untrained, task)


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
