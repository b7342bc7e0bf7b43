"""Runs that are stopped, killed, or meet faults, and what is lost: nothing."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from test_cli import ROOT, SCRIPTS, SMALL, of_script, records, run, save_untrained  # noqa: F401 (run: a fixture)
from verifiers import Problem, Task, Verdict, load_task

FLAGS = [*SMALL, "--task", "arithmetic", "--levels", "1", "--steps", "6", "--save-every", "2", "--eval-every", "3"]
EXTRA = {"bon_rl.py": ["--estimator", "variational", "--n", "6", "--baseline", "value", "--kl-coef", "0.1"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A policy that is right now and then on level 1: without rewards there would be nothing to get wrong."""
    folder, task = save_untrained(tmp_path_factory.mktemp("model")), load_task("arithmetic")
    policy = common.load_policy(folder, task)
    problems = sorted({p.prompt: p for p in task.train if p.level == 1}.values(), key=lambda p: p.prompt)
    prompts = common.encode_prompts(policy, task, problems, task.max_new_tokens)
    experts = common.expert_rollouts(policy, task, prompts, [p.solution for p in problems])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        common.accumulate_gradient(policy, experts, torch.ones(len(problems), 1), 1.0, 10**6, None)
        optimizer.step()
    common.save_policy(policy, folder)
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

        def with_action(*args):
            seen.append(1)
            if len(seen) == number:
                action()
            return step(*args)

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


def test_the_last_two_checkpoints_stay_and_a_torn_one_is_passed_over(run, model, uninterrupted, tmp_path):  # noqa: F811
    expected, _ = uninterrupted("pass_at_k_pg.py")
    folder = tmp_path / "runs/whole"
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:999] + b"x" + data[1000:]):
        first, last = sorted((folder / "checkpoints").iterdir())
        assert first.name.startswith("00000004-") and last.name.startswith("00000006-")
        last.write_bytes(damage(last.read_bytes()))
        result = run("pass_at_k_pg.py", "--resume", str(folder))
        assert (
            f"{last} is torn and was removed: using the one before it" in result.stdout
            and "resuming at step 4" in result.stdout
        )
        assert result.returncode == 0 and outcome(folder) == expected


def test_a_finished_run_can_be_resumed_for_its_table(uninterrupted, run, tmp_path):  # noqa: F811
    expected, _ = uninterrupted("bon_rl.py")
    result = run("bon_rl.py", "--resume", "runs/whole")
    assert result.returncode == 0 and "won" in result.stdout and outcome(tmp_path / "runs/whole") == expected


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
    weights = torch.cat([p.flatten() for p in common.load_policy("runs/two/policy", TASK).model.parameters()])
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

    def with_little_memory(policy, rollouts, A, temperature, budget, clip):
        budgets.append(budget)
        if budget > limit:
            raise error
        return gradient(policy, rollouts, A, temperature, budget, clip)

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
    assert [path.name[:8] for path in (tmp_path / "runs/full/checkpoints").iterdir()] == ["00000002"]
    assert run("pass_at_k_pg.py", "--resume", "runs/full").returncode == 0  # there is room again
    assert outcome(tmp_path / "runs/full") == expected


def test_a_log_that_cannot_be_written_and_a_folder_that_cannot_be_made_are_clear_lines(
    run, model, monkeypatch, tmp_path
):  # noqa: F811
    def onto_a_full_disk(path, record):
        with open("/dev/full", "w") as file:
            file.write(json.dumps(record))

    with monkeypatch.context() as patch:
        patch.setattr(common, "append_json", onto_a_full_disk)
        result = run("pass_at_k_pg.py", *SMALL, "--model", model)
        assert result.returncode == 2 and result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    os.rename(tmp_path / "runs", tmp_path / "old")
    (tmp_path / "runs").write_text("")
    result = run("pass_at_k_pg.py", *SMALL, "--model", model)
    assert result.returncode == 2 and "cannot create the run folder runs/pass_at_k_pg" in result.stderr


def test_a_verifier_that_raises_costs_its_samples_alone(capsys):
    def verify(problems, rows):
        if any("bad" in response for row in rows for response in row):
            raise ZeroDivisionError("\x1b[2J")
        return Verdict(torch.ones(len(rows), len(rows[0])), torch.zeros(len(rows), len(rows[0])).long(), {"slow": 1})

    task = Task("fragile", [], [], verify)
    rows = [["a", "b", "c"], ["a", "bad", "c"], ["bad", "b", "bad"], ["a", "a", "a"]]
    verdict = common.judged(task, [Problem(str(i), "") for i in range(4)], rows)
    good = torch.tensor([["bad" not in response for response in row] for row in rows])
    assert torch.equal(verdict.rewards, good.float()) and torch.equal(verdict.votes, good.long() - 1)
    assert (
        verdict.counts["verifier_errors"] == 3 and verdict.seconds > 0 and torch.equal(verdict.scores, verdict.rewards)
    )
    out = capsys.readouterr()
    assert "\x1b" not in out.out + out.err and "ZeroDivisionError" in out.out + out.err


def test_samples_are_shown_escaped(run, model, capsys):  # noqa: F811
    verdict = Verdict(torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1).long())
    common.show_samples([Problem("1+1=", "2"), Problem("1+2=", "3")], [["\x1b[2J\u202e2\0"], ["5"]], verdict, 1)
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
    common.append_json(tmp_path / "log", {"a": float("nan"), "b": [float("inf"), 1]})
    assert (tmp_path / "log").read_text() == '{"a": null, "b": [null, 1]}\n'
