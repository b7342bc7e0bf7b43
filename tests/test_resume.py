"""Runs that are stopped, killed, or meet faults, and what is lost: nothing."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import ROOT, SCRIPTS, SMALL, of_script, records, run, save_untrained  # noqa: F401 (run: a fixture)

import common
import harness.policy
import harness.report
import harness.run
from verifiers import Problem, arithmetic, load_task

FLAGS = [*SMALL, "--task", "arithmetic", "--levels", "1", "--steps", "6", "--save-every", "2", "--eval-every", "3"]
EXTRA = {"bon_rl.py": ["--estimator", "variational", "--n", "6", "--baseline", "value", "--kl-coef", "0.1"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A policy that is right now and then on level 1: without rewards there would be nothing to get wrong."""
    folder, task = save_untrained(tmp_path_factory.mktemp("model")), load_task("arithmetic")
    policy = harness.policy.load_policy(folder, task)
    problems = sorted({p.prompt: p for p in task.train if p.level == 1}.values(), key=lambda p: p.prompt)
    prompts = harness.policy.encode_prompts(policy, task, problems, task.max_new_tokens)
    experts = harness.policy.expert_rollouts(policy, task, prompts, [p.solution for p in problems])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        common.accumulate_gradient(policy, experts, torch.ones(len(problems), 1))
        optimizer.step()
    harness.policy.save_policy(policy, folder)
    return folder


def outcome(folder: Path) -> tuple[bytes, bytes]:
    """What a run leaves that depends on its arguments alone."""
    return (folder / "metrics.jsonl").read_bytes(), (folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture
def uninterrupted(run, model, tmp_path):  # noqa: F811
    """uninterrupted(script) -> the outcome of a run that nothing stops, and the flags of such a run."""

    def result(script):
        flags = [*FLAGS, *EXTRA.get(script, []), "--model", model]
        assert run(script, *flags, "--run-name", "whole").returncode == 0
        log = [r for r in records(tmp_path / "runs/whole") if "loss" in r]
        assert sum(r["grad_norm"] > 0 for r in log) >= 3, "nothing was learnt: the test would see nothing"
        return outcome(tmp_path / "runs/whole"), flags

    return result


@pytest.fixture
def at_step(monkeypatch):
    """at_step(number, action): call action() in the middle of that step, once."""

    def install(number, action, seen=[]):
        step, seen[:] = common.policy_gradient_step, []

        def with_action(*args, **others):
            seen.append(1)
            if len(seen) == number:
                action()
            return step(*args, **others)

        monkeypatch.setattr(common, "policy_gradient_step", with_action)

    return install


def started(script, flags, cwd, ready):
    """A process of the script, once ready() or ended."""
    command = [sys.executable, str(ROOT / script), *(of_script(script, flag) for flag in flags)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not ready():
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(script, uninterrupted, run, tmp_path):  # noqa: F811
    expected, flags = uninterrupted(script)
    log = tmp_path / "runs/killed/metrics.jsonl"  # its line of step 5 is ahead of the checkpoint of step 4
    flags = [*flags, "--save-every", "4", "--run-name", "killed"]
    process = started(script, flags, tmp_path, lambda: log.exists() and b'"step": 5' in log.read_bytes())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    result = run(script, "--resume", "runs/killed")
    assert result.returncode == 0, result.stderr
    assert "resuming at step 4" in result.stdout
    assert outcome(tmp_path / "runs/killed") == expected


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again(script, uninterrupted, run, tmp_path):  # noqa: F811
    """Killed at random moments, the first ones before any checkpoint, until a run comes to its end."""
    expected, flags = uninterrupted(script)
    folder, rng = tmp_path / "runs/killed", random.Random(0)
    process = started(script, [*flags, "--run-name", "killed"], tmp_path, (folder / "args.json").exists)
    for _ in range(6):
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
        written = (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0
        process = started(script, ["--resume", "runs/killed"], tmp_path,
                          lambda: (folder / "metrics.jsonl").exists()
                          and (folder / "metrics.jsonl").stat().st_size > written * rng.uniform(0, 1.2))  # fmt: skip
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert outcome(folder) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_it(number, uninterrupted, run, at_step, tmp_path):  # noqa: F811
    expected, flags = uninterrupted("pass_at_k_pg.py")
    at_step(3, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    result = run("pass_at_k_pg.py", *flags, "--run-name", "stopped")
    assert result.returncode == 0 and "stopped after step 3; to go on: python" in result.stdout
    assert [r["step"] for r in records(tmp_path / "runs/stopped") if "reward" in r] == [1, 2, 3]
    assert signal.getsignal(number) == handler
    result = run("pass_at_k_pg.py", "--resume", "runs/stopped")
    assert result.returncode == 0 and "resuming at step 3" in result.stdout
    assert outcome(tmp_path / "runs/stopped") == expected


def test_a_second_signal_ends_the_run_at_once(run, model, at_step):  # noqa: F811
    at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run("pass_at_k_pg.py", *FLAGS, "--model", model)


def test_a_checkpoint_is_whole_or_the_one_before_it_stays(run, model, uninterrupted, at_step, tmp_path):  # noqa: F811
    """Killed while it writes the second checkpoint: half a file under another name, which a resume passes over."""
    expected, flags = uninterrupted("pass_at_k_pg.py")
    code = f"""
import sys, os, runpy, torch
save, calls = torch.save, []
def half(value, file):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"half of it"); file.flush(); os.kill(os.getpid(), 9)
    save(value, file)
torch.save = half
sys.argv[0] = "pass_at_k_pg.py"
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "pass_at_k_pg.py")!r}, run_name="__main__")
"""
    killed = subprocess.run([sys.executable, "-c", code, *flags, "--run-name", "killed"], cwd=tmp_path,
                            capture_output=True, text=True)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = run("pass_at_k_pg.py", "--resume", "runs/killed")
    assert "resuming at step 2" in result.stdout and result.returncode == 0
    assert outcome(tmp_path / "runs/killed") == expected


def test_a_finished_run_can_be_resumed_for_what_is_missing(uninterrupted, run, tmp_path):  # noqa: F811
    expected, _ = uninterrupted("bon_rl.py")
    shutil.rmtree(tmp_path / "runs/whole/policy")
    (tmp_path / "runs/whole/curves.png").unlink()
    result = run("bon_rl.py", "--resume", "runs/whole")
    assert result.returncode == 0 and "won" in result.stdout and outcome(tmp_path / "runs/whole") == expected
    assert (tmp_path / "runs/whole/curves.png").exists()


def test_resuming_with_other_arguments_is_refused_by_name(run, model, tmp_path):  # noqa: F811
    flags = [*SMALL, "--model", model, "--run-name", "a"]
    assert run("pass_at_k_pg.py", *flags).returncode == 0
    before = outcome(tmp_path / "runs/a")
    assert run("pass_at_k_pg.py", *flags, "--resume", "runs/a").returncode == 0  # the same arguments are welcome
    result = run("pass_at_k_pg.py", "--resume", "runs/a", "--lr", "1", "--steps", "9")
    assert result.returncode == 2 and "leave out --steps, --lr" in result.stderr
    result = run("majority_pg.py", "--resume", "runs/a")
    assert result.returncode == 2 and "runs/a is a run of pass_at_k_pg.py" in result.stderr
    result = run("pass_at_k_pg.py", "--resume", "runs/b")
    assert result.returncode == 2 and "runs/b is not a run folder" in result.stderr
    assert outcome(tmp_path / "runs/a") == before


# --- Faults, injected ---


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(run, model, monkeypatch, tmp_path):  # noqa: F811
    gradient, calls = common.accumulate_gradient, []

    def sometimes_nan(policy, *args):
        loss = gradient(policy, *args)
        calls.append(1)
        if len(calls) in bad:
            next(policy.model.parameters()).grad.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(common, "accumulate_gradient", sometimes_nan)
    bad = {2, 3}
    assert run("pass_at_k_pg.py", *FLAGS, "--model", model, "--run-name", "two").returncode == 0
    log = [r for r in records(tmp_path / "runs/two") if "reward" in r]
    assert [r["skipped"] for r in log] == [0, 1, 1, 0, 0, 0] and log[1]["grad_norm"] is None
    weights = torch.cat([p.flatten() for p in harness.policy.load_policy("runs/two/policy", TASK).model.parameters()])
    assert weights.isfinite().all()
    calls.clear()
    bad = set(range(4, 99))
    result = run("pass_at_k_pg.py", *FLAGS, "--steps", "20", "--model", model, "--run-name", "ten")
    assert result.returncode == 2 and "ten steps in a row" in result.stderr and "lower --lr" in result.stderr
    assert len([r for r in records(tmp_path / "runs/ten") if "reward" in r]) == 13


TASK = SimpleNamespace(name="none", warm_start=None)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(run, model, monkeypatch, tmp_path, error):  # noqa: F811
    gradient, budgets = common.accumulate_gradient, []

    def with_little_memory(policy, *args):
        budgets.append(policy.micro_batch_tokens)
        if policy.micro_batch_tokens > limit:
            raise error
        return gradient(policy, *args)

    monkeypatch.setattr(common, "accumulate_gradient", with_little_memory)
    limit = 5000
    result = run("pass_at_k_pg.py", *SMALL, "--model", model)
    assert result.returncode == 0, result.stderr
    assert budgets == [16384, 8192, 4096, 4096]
    assert "out of memory: going on with --micro-batch-tokens 4096" in result.stdout + result.stderr
    limit = 0
    result = run("pass_at_k_pg.py", *SMALL, "--model", model)
    assert result.returncode == 2 and "out of memory with one response at a time" in result.stderr


def test_a_full_disk_is_a_clear_line_and_the_last_checkpoint_is_intact(uninterrupted, run, monkeypatch, tmp_path):  # noqa: F811
    expected, flags = uninterrupted("pass_at_k_pg.py")
    save, calls = torch.save, []

    def onto_a_full_disk(value, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, file)

    monkeypatch.setattr(torch, "save", onto_a_full_disk)
    result = run("pass_at_k_pg.py", *flags, "--run-name", "full")
    assert result.returncode == 2
    assert "cannot write a checkpoint of step 4" in result.stderr and "No space left on device" in result.stderr
    result = run("pass_at_k_pg.py", "--resume", "runs/full")  # there is room again
    assert result.returncode == 0 and "resuming at step 2" in result.stdout
    assert outcome(tmp_path / "runs/full") == expected


def test_a_full_log_and_a_folder_that_cannot_be_made_are_clear_lines(run, model, monkeypatch, tmp_path):  # noqa: F811
    def onto_a_full_disk(path, record):
        with open("/dev/full", "w") as file:
            file.write(json.dumps(record))

    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "append_json", onto_a_full_disk)
        result = run("pass_at_k_pg.py", *SMALL, "--model", model)
        assert result.returncode == 2 and result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    os.rename(tmp_path / "runs", tmp_path / "old")
    (tmp_path / "runs").write_text("")
    result = run("pass_at_k_pg.py", *SMALL, "--model", model)
    assert result.returncode == 2 and "Not a directory: 'runs/pass_at_k_pg" in result.stderr


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_broken_verifier_ends_the_run_after_a_checkpoint(broken, run, uninterrupted, monkeypatch, tmp_path):  # noqa: F811
    """It must not look like a bad policy, with rewards of 0."""
    expected, flags = uninterrupted("pass_at_k_pg.py")
    verify, calls = arithmetic.verify, []

    def fails_at_step_4(problems, responses):
        calls.append(1)
        verdict = verify(problems, responses)
        if len(calls) == 6:  # two evaluations before it, one of the start and one after step 3
            if broken == "raises":
                raise ImportError("no module named sympy")
            verdict.rewards[0, 0] = torch.nan
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "verify", fails_at_step_4)
        flags = [*flags, "--run-name", "broken", "--save-every", "5"]
        if broken == "raises":
            with pytest.raises(ImportError, match="sympy"):
                run("pass_at_k_pg.py", *flags)
        else:
            result = run("pass_at_k_pg.py", *flags)
            assert result.returncode == 2 and "gave rewards that are not finite numbers" in result.stderr
    result = run("pass_at_k_pg.py", "--resume", "runs/broken")
    assert result.returncode == 0 and "resuming at step 3" in result.stdout
    assert outcome(tmp_path / "runs/broken") == expected


def test_samples_are_shown_escaped(run, model, capsys):  # noqa: F811
    problems, responses = [Problem("1+1=", "2"), Problem("1+2=", "3")], [["\x1b[2J\u202e2\0"], ["5"]]
    harness.report.show_samples(problems, responses, torch.tensor([[1.0], [0.0]]), 1)
    assert capsys.readouterr().out == "1  '1+1=' -> '\\x1b[2J\\u202e2\\x00'\n"
    for steps, evaluations in (("0", 1), ("2", 2)):
        result = run("pass_at_k_pg.py", *SMALL, "--model", model, "--show-samples", "2", "--steps", steps)
        shown = [line.partition(" -> '")[0] for line in result.stdout.splitlines() if " -> '" in line]
        assert len(shown) == 2 * evaluations and shown[0] != shown[1]


def test_tensorboard_is_optional(run, model):  # noqa: F811
    result = run("pass_at_k_pg.py", *SMALL, "--model", model, "--tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert result.returncode == 2 and "--tensorboard needs that library: pip install tensorboard" in result.stderr
    else:
        assert result.returncode == 0, result.stderr


def test_what_is_not_finite_is_null_in_the_logs(tmp_path):
    harness.run.append_json(tmp_path / "log", {"a": float("nan"), "b": [float("inf"), 1]})
    assert (tmp_path / "log").read_text() == '{"a": null, "b": [null, 1]}\n'
