"""Runs that are stopped, killed, or meet faults, and what is lost: nothing."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import FLAGS, ROOT, SCRIPTS, SMALL, ended, outcome, records, started

import common
import harness.policy
import harness.report
import harness.run
from verifiers import arithmetic, learned

PASS, RL = "pass_at_k_pg.py", "bon_rl.py"
TASK = SimpleNamespace(name="none", warm_start=None)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(number, action): call action() in the middle of the number-th step from here, once."""
    step = common.policy_gradient_step

    def install(number, action):
        seen = []

        def with_action(*args, **others):
            seen.append(1)
            if len(seen) == number:
                action()
            return step(*args, **others)

        monkeypatch.setattr(common, "policy_gradient_step", with_action)

    return install


def wait(process, ready):
    """Until ready() or its end."""
    while process.is_alive() and not ready():
        time.sleep(0.001)


class Killed(BaseException):
    """The end of a script in the middle of a step, with nothing done after it."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_cut_off_and_resumed_equals_uninterrupted_bit_for_bit(script, uninterrupted, run, at_step, tmp_path):
    """Twice, ahead of a checkpoint: in steps 4 and 6, with checkpoints after steps 2 and 4."""
    whole, flags, _ = uninterrupted(script)
    for number, command in ((4, [*flags, "--run-name", "cut"]), (4, ["--resume", "runs/cut"])):
        at_step(number, kill)
        with pytest.raises(Killed):
            run(script, *command)
    result = run(script, "--resume", "runs/cut")
    assert result.returncode == 0 and "resuming at step 4" in result.stdout, result.stderr
    assert outcome(tmp_path / "runs/cut") == outcome(whole)


def kill():
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again(script, uninterrupted, run, tmp_path):
    """Killed at random moments, the first ones before any checkpoint, until a run comes to its end."""
    whole, flags, _ = uninterrupted(script)
    folder, rng = tmp_path / "runs/killed", random.Random(0)
    process = started(ROOT / script, *flags, "--run-name", "killed", cwd=tmp_path)
    wait(process, (folder / "args.json").exists)
    for _ in range(6):
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        written = (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0
        process, log = started(ROOT / script, "--resume", "runs/killed", cwd=tmp_path), folder / "metrics.jsonl"
        wait(process, lambda: log.exists() and log.stat().st_size > written * rng.uniform(0, 1.2))
    returncode, _, err = ended(process, cwd=tmp_path)
    assert returncode == 0, err
    assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_it(number, uninterrupted, run, at_step, tmp_path):
    whole, flags, _ = uninterrupted(PASS)
    at_step(3, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    result = run(PASS, *flags, "--run-name", "stopped")
    assert result.returncode == 128 + number and "stopped after step 3; to go on:\npython" in result.stdout
    assert [r["step"] for r in records(tmp_path / "runs/stopped") if "reward" in r] == [1, 2, 3]
    assert signal.getsignal(number) == handler
    result = run(PASS, "--resume", "runs/stopped")
    assert result.returncode == 0 and "resuming at step 3" in result.stdout
    assert outcome(tmp_path / "runs/stopped") == outcome(whole)


def test_a_second_signal_ends_the_run_at_once(run, skilled, at_step):
    at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    result = run(PASS, *FLAGS, "--model", skilled)
    assert result.returncode == 130 and result.stderr.endswith("--resume the folder that it was writing to\n")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("end", [Killed(), FULL], ids=["killed", "a full disk"])
def test_a_checkpoint_is_whole_or_the_one_before_it_stays(end, uninterrupted, run, monkeypatch, tmp_path):
    """Cut off while it writes the second checkpoint: half a file under another name, which a resume passes over."""
    whole, flags, _ = uninterrupted(PASS)
    save, calls = torch.save, []

    def half(value, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise end
        save(value, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed) if end is not FULL else contextlib.nullcontext():
        result = run(PASS, *flags, "--run-name", "cut")
        assert result.returncode == 2 and "cannot write a checkpoint of step 4" in result.stderr
        assert "no space left on the disk of runs/cut/checkpoint.pt" in result.stderr
    assert len(calls) == 2
    result = run(PASS, "--resume", "runs/cut")
    assert "resuming at step 2" in result.stdout and result.returncode == 0
    assert outcome(tmp_path / "runs/cut") == outcome(whole)


def test_a_finished_run_can_be_resumed_for_what_is_missing(uninterrupted, run, tmp_path):
    """Such as a run that died after its last step."""
    whole, _, out = uninterrupted(RL)
    shutil.copytree(whole, tmp_path / "runs/whole")
    shutil.rmtree(tmp_path / "runs/whole/policy")
    (tmp_path / "runs/whole/curves.png").unlink()
    result = run(RL, "--resume", "runs/whole")
    assert result.returncode == 0 and outcome(tmp_path / "runs/whole") == outcome(whole)
    assert (tmp_path / "runs/whole/curves.png").exists()
    table = [line for line in out.splitlines() if " -> " in line]
    assert len(table) > 1 and [line for line in result.stdout.splitlines() if " -> " in line] == table


def test_resuming_with_other_arguments_is_refused_by_name(run, skilled, tmp_path):
    flags = [*SMALL, "--model", skilled, "--run-name", "a"]
    assert run(PASS, *flags).returncode == 0
    before = outcome(tmp_path / "runs/a")
    assert run(PASS, *flags, "--resume", "runs/a").returncode == 0  # the same arguments are welcome
    result = run(PASS, "--resume", "runs/a", "--lr", "1", "--steps", "9", "--eval-n", "8", "--save-every", "1")
    assert result.returncode == 2 and result.stderr.endswith("keeps its own arguments: leave out --lr, --eval-n\n")
    result = run("majority_pg.py", "--resume", "runs/a")
    assert result.returncode == 2 and "runs/a is a run of pass_at_k_pg.py" in result.stderr
    result = run(PASS, "--resume", "runs/b")
    assert result.returncode == 2 and "runs/b is not a run folder" in result.stderr
    assert outcome(tmp_path / "runs/a") == before


def test_a_finished_run_goes_on_for_more_steps_by_the_schedule_of_the_new_total(run, skilled, monkeypatch, tmp_path):
    """The learning rate falls from .001 by a quarter a step, by an eighth from step 5 on; the first policy stays."""
    rates, step = [], common.policy_gradient_step
    noted = lambda *args: rates.append(args[1].param_groups[0]["lr"]) or step(*args)  # noqa: E731
    monkeypatch.setattr(common, "policy_gradient_step", noted)
    flags = [*SMALL, "--steps", "4", "--eval-every", "0", "--lr", "1e-3", "--model", skilled, "--run-name", "a"]
    assert run(PASS, *flags).returncode == 0
    first = outcome(tmp_path / "runs/a")
    result = run(PASS, "--resume", "runs/a", "--steps", "8", "--eval-every", "3")
    assert result.returncode == 0, result.stderr
    assert rates == pytest.approx([x / 1000 for x in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])
    said = "from step 5 on, schedules follow 8 steps, no longer 4:"
    assert result.stdout.splitlines()[:2] == [said, "the result is not the one of an uninterrupted run of 8 steps"]
    log = records(tmp_path / "runs/a")
    assert [r["step"] for r in log if "loss" in r] == [*range(1, 9)]
    assert [r["step"] for r in log if "eval" in r] == [0, 4, 6, 8]
    last = outcome(tmp_path / "runs/a")
    assert (tmp_path / "runs/a/policy-4/model.safetensors").read_bytes() == first[-1] != last[-1]
    args = json.loads((tmp_path / "runs/a/args.json").read_text())
    assert (args["steps"], args["eval_every"], args["extended_after"], args["resume"]) == (8, 3, [4], None)
    result = run(PASS, "--resume", "runs/a")  # its arguments are now these
    assert result.returncode == 0 and "schedules" not in result.stdout and outcome(tmp_path / "runs/a") == last
    result = run(PASS, "--resume", "runs/a", "--steps", "7")
    assert result.returncode == 2 and "runs/a has done 8 steps: --steps must be 8 or more, not 7" in result.stderr
    assert outcome(tmp_path / "runs/a") == last and json.loads((tmp_path / "runs/a/args.json").read_text()) == args


def test_without_schedules_a_longer_run_is_the_uninterrupted_one(run, skilled, tmp_path):
    flags = [*SMALL, "--no-lr-decay", "--eval-every", "2", "--model", skilled]
    assert run(PASS, *flags, "--steps", "4", "--run-name", "whole").returncode == 0
    assert run(PASS, *flags, "--steps", "2", "--run-name", "longer").returncode == 0
    result = run(PASS, "--resume", "runs/longer", "--steps", "4")
    assert result.returncode == 0 and "schedules" not in result.stdout
    assert outcome(tmp_path / "runs/longer") == outcome(tmp_path / "runs/whole")


def test_a_run_cut_off_before_its_first_checkpoint_may_have_another_number_of_steps(run, skilled, at_step, tmp_path):
    """Nothing of it is left, so that it is the run of as many steps."""
    flags = [*SMALL, "--model", skilled]
    at_step(2, kill)
    with pytest.raises(Killed):
        run(PASS, *flags, "--steps", "2", "--run-name", "cut")
    result = run(PASS, "--resume", "runs/cut", "--steps", "3")
    assert result.returncode == 0 and "schedules" not in result.stdout
    assert "extended_after" not in json.loads((tmp_path / "runs/cut/args.json").read_text())
    assert run(PASS, *flags, "--steps", "3", "--run-name", "whole").returncode == 0
    assert outcome(tmp_path / "runs/cut") == outcome(tmp_path / "runs/whole")


@pytest.mark.parametrize("flags, after", [([], [0.5, 0.4]), (["--kl-anneal-steps", "8"], [0.65, 0.6])])
def test_the_coefficient_of_the_kl_follows_the_new_total(flags, after, run, untrained, monkeypatch):
    """It moves from .8 to .4 over 2 steps, and over 4 from the third on; over --kl-anneal-steps where they are given.
    Without a reward, and with 1 in place of the KL's advantages, it is what a step trains on."""
    betas, step = [], common.policy_gradient_step

    def recorded(policy, optimizer, rollouts, A, *args, **others):
        betas.extend(A.unique().tolist())
        return step(policy, optimizer, rollouts, A, *args, **others)

    monkeypatch.setattr(common, "policy_gradient_step", recorded)
    monkeypatch.setattr(common, "kl_advantages", lambda ratios: torch.ones(ratios.shape[:2]))
    schedule = ["--kl-coef", "0.8", "--kl-coef-end", "0.4", "--kl-delay", "0", "--no-lr-decay", *flags]
    assert run(RL, *SMALL, *schedule, "--model", untrained, "--run-name", "a").returncode == 0
    result = run(RL, "--resume", "runs/a", "--steps", "4")
    assert result.returncode == 0 and "from step 3 on, schedules follow 4 steps" in result.stdout, result.stderr
    assert betas == pytest.approx([*([0.75, 0.7] if flags else [0.6, 0.4]), *after])


# --- Faults, injected ---


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(run, skilled, monkeypatch, tmp_path):
    gradient, calls = common.accumulate_gradient, []

    def sometimes_nan(policy, *args):
        loss = gradient(policy, *args)
        calls.append(1)
        if len(calls) in bad:
            next(policy.model.parameters()).grad.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(common, "accumulate_gradient", sometimes_nan)
    bad = {2, 3}
    assert run(PASS, *FLAGS, "--model", skilled, "--run-name", "two").returncode == 0
    log = [r for r in records(tmp_path / "runs/two") if "reward" in r]
    assert [r["skipped"] for r in log] == [0, 1, 1, 0, 0, 0] and log[1]["grad_norm"] is None
    weights = torch.cat([p.flatten() for p in harness.policy.load_policy("runs/two/policy", TASK).model.parameters()])
    assert weights.isfinite().all()
    calls.clear()
    bad = set(range(4, 99))
    result = run(PASS, *FLAGS, "--steps", "20", "--model", skilled, "--run-name", "ten")
    assert result.returncode == 2 and "ten steps in a row" in result.stderr and "lower --lr" in result.stderr
    assert len([r for r in records(tmp_path / "runs/ten") if "reward" in r]) == 13


def test_a_full_log_and_a_folder_that_cannot_be_made_are_clear_lines(run, skilled, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        write = harness.run.append_json
        patch.setattr(harness.run, "append_json", lambda _, record: write(Path("/dev/full"), record))
        result = run(PASS, *SMALL, "--model", skilled)
        full = "error: no space left on the disk of /dev/full"
        assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(full), result.stderr
    os.rename(tmp_path / "runs", tmp_path / "old")
    (tmp_path / "runs").write_text("")
    result = run(PASS, *SMALL, "--model", skilled)
    assert result.returncode == 2 and "Not a directory: 'runs/pass_at_k_pg" in result.stderr


BREAKS = {
    "at first": (PASS, 2, 0),  # the first call tries the verifier before the model is loaded
    "in step 4": (PASS, 7, 3),  # two evaluations before it, one at the start and one after step 3
    "in the last evaluation": (RL, 10, 6),
}


@pytest.mark.parametrize("when", BREAKS)
def test_a_broken_verifier_ends_the_run_after_a_checkpoint(when, run, uninterrupted, monkeypatch, tmp_path):
    """It must not look like a bad policy, with rewards of 0; mended, the run goes on as if nothing had happened."""
    script, call, step = BREAKS[when]
    whole, flags, _ = uninterrupted(script)
    verify, calls = arithmetic.verify, iter(range(1, 99))

    def broken(problems, responses):
        if next(calls) == call:
            raise ImportError("no module named sympy")
        return verify(problems, responses)

    with monkeypatch.context() as patch, pytest.raises(ImportError, match="sympy"):
        patch.setattr(arithmetic, "verify", broken)
        run(script, *flags, "--run-name", "broken", "--save-every", "5")
    result = run(script, "--resume", "runs/broken")
    assert result.returncode == 0 and f"resuming at step {step}" in result.stdout
    assert outcome(tmp_path / "runs/broken") == outcome(whole)


def test_killed_while_the_learned_verifier_is_saved(run, skilled, monkeypatch, tmp_path):
    """The next resume trains it again, and later ones read it."""
    flags = [*FLAGS, "--steps", "2", "--verifier", "learned", "--verifier-problems", "32", "--model", skilled]
    flags += ["--run-name", "killed"]
    save = harness.run.save_policy

    def half(verifier, folder):
        save(verifier, folder)
        (Path(folder) / "model.safetensors").write_bytes(b"")
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(harness.run, "save_policy", half)
        try:
            run(RL, *flags)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    trained, verifier = [], learned.trained_verifier
    monkeypatch.setattr(learned, "trained_verifier", lambda *args, **kw: (trained.append(1), verifier(*args, **kw))[1])
    for _ in range(2):
        result = run(RL, "--resume", "runs/killed")
        assert result.returncode == 0 and "bon@2" in result.stdout, result.stderr
        assert trained == [1]
    run(RL, *flags[:-1], "whole")
    assert trained == [1, 1] and outcome(tmp_path / "runs/killed") == outcome(tmp_path / "runs/whole")


def test_samples_are_shown_escaped(run, skilled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "decode", lambda policy, rollouts: [["\x1b[2J\u202e2\0", "5"] * 2] * 2)
        result = run(PASS, *SMALL, "--model", skilled, "--show-samples", "1", "--steps", "0", "--run-name", "escaped")
    (shown,) = [line for line in result.stdout.splitlines() if " -> " in line]
    assert re.fullmatch(r"0  '\d\*\d=' -> '\\x1b\[2J\\u202e2\\x00'", shown)
    text = Path("runs/escaped/samples.jsonl").read_text()
    assert "\x1b" not in text and text.isascii() and len(text.splitlines()) == 2
    for steps, evaluations in (("0", 1), ("2", 2)):
        result = run(PASS, *SMALL, "--model", skilled, "--show-samples", "2", "--steps", steps)
        shown = [line.partition(" -> '")[0] for line in result.stdout.splitlines() if " -> '" in line]
        assert len(shown) == 2 * evaluations and shown[0] != shown[1]
        assert f"responses at step {steps}:" in result.stdout.splitlines()


def test_a_run_with_the_old_names_is_not_resumed_and_says_so_in_a_line(run, skilled, tmp_path):
    assert run("pass_at_k_pg.py", *SMALL, "--model", skilled, "--run-name", "a").returncode == 0
    path = tmp_path / "runs" / "a" / "args.json"
    saved = json.loads(path.read_text())
    other = "a run of another version, whose flags and metrics have other names: start anew"
    without = {name: value for name, value in saved.items() if name != "files"}  # what came after the new names
    for args, why in (
        (without, other), (saved | {"old_name": 1}, other), ({"steps": 2}, "not a run folder: KeyError: 'script'"),
        ([1], "not a run folder: TypeError: 'str' object cannot be interpreted as an integer"),
    ):  # fmt: skip
        path.write_text(json.dumps(args))
        ended = run("pass_at_k_pg.py", "--resume", "runs/a")
        assert ended.returncode == 2 and ended.stderr == f"error: runs/a is {why}\n"
