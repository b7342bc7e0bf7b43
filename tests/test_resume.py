"""Runs that are stopped, killed, or meet faults, and what is lost: nothing."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_zoo import save_tiny
from runs import FLAGS, SCRIPTS, SMALL, at_call, outcome, records, save_untrained
from transformers import LlamaForCausalLM

import common
import harness.policy
import harness.report
import harness.run
from verifiers import arithmetic, learned

PASS, RL = "pass_at_k_pg.py", "bon_rl.py"
TASK = SimpleNamespace(name="none", warm_start=None)


class Killed(BaseException):
    """The end of a script in the middle of a step, with nothing done after it."""


def raising(error):
    def action(*args):
        raise error

    return action


def half_of_it(error):
    """torch.save that fails in the middle of a file."""

    def action(value, file):
        file.write(b"half of it")
        raise error

    return action


def sending(number, times=1):
    return lambda *_: [os.kill(os.getpid(), number) for _ in range(times)]


STEP, SAVE, VERIFY = (common, "policy_gradient_step"), (torch, "save"), (arithmetic, "verify")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = ImportError("no module named sympy")
SAVED = "cannot write a checkpoint of step 4 to {0}: no space left on the disk of {0}".format("runs/cut/checkpoint.pt")
STOPPED = "stopped after step 3; to go on:\npython"
# name -> script; the function, its call, and what happens there; the exit code or what is raised, what is said, and
# the step that is resumed. Checkpoints are after steps 2 and 4; where a verifier breaks, after step 5. It is called
# as a trial, in each evaluation (before step 1, after 3 and 6) and in each step.
INTERRUPTIONS = {
    **{f"{script} killed twice": (script, STEP, 4, raising(Killed()), Killed, "", 4) for script in SCRIPTS},
    "SIGINT": (PASS, STEP, 3, sending(signal.SIGINT), 130, STOPPED, 3),
    "SIGTERM": (PASS, STEP, 3, sending(signal.SIGTERM), 143, STOPPED, 3),
    "killed in a checkpoint": (PASS, SAVE, 2, half_of_it(Killed()), Killed, "", 2),
    "a full disk": (PASS, SAVE, 2, half_of_it(FULL), 2, SAVED, 2),
    "a verifier that breaks at first": (PASS, VERIFY, 2, raising(BROKEN), ImportError, "", 0),
    "a verifier that breaks in step 4": (PASS, VERIFY, 7, raising(BROKEN), ImportError, "", 3),
    "a verifier that breaks at last": (RL, VERIFY, 10, raising(BROKEN), ImportError, "", 6),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(name, uninterrupted, run, monkeypatch):
    """A checkpoint is whole, or the one before it stays. A verifier that breaks must not look like a bad policy, with
    rewards of 0: the run ends after a checkpoint, and goes on as if nothing had happened."""
    script, where, number, action, end, said, step = INTERRUPTIONS[name]
    whole, flags, _ = uninterrupted(script)
    flags = [*flags, "--run-name", "cut", *(["--save-every", "5"] if where is VERIFY else [])]
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    for command in (flags, ["--resume", "runs/cut"])[: 2 if "twice" in name else 1]:
        with monkeypatch.context() as patch, pytest.raises(end) if isinstance(end, type) else contextlib.nullcontext():
            patch.setattr(*where, at_call(number, action, getattr(*where)))
            result = run(script, *command, code=end)
            assert said in result.stdout + result.stderr
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = run(script, "--resume", "runs/cut", code=0)
    assert f"resuming at step {step}" in result.stdout
    assert outcome(Path("runs/cut")) == outcome(whole)


def test_a_second_signal_ends_the_run_at_once(run, skilled, monkeypatch):
    monkeypatch.setattr(*STEP, at_call(3, sending(signal.SIGINT, times=2), getattr(*STEP)))
    result = run(PASS, *FLAGS, "--model", skilled, code=130)
    assert result.stderr.endswith("--resume the folder that it was writing to\n")


def test_a_finished_run_can_be_resumed_for_what_is_missing(uninterrupted, run, tmp_path):
    """A run may have died after its last step."""
    whole, _, out = uninterrupted(RL)
    shutil.copytree(whole, tmp_path / "runs/whole")
    shutil.rmtree(tmp_path / "runs/whole/policy")
    (tmp_path / "runs/whole/curves.png").unlink()
    result = run(RL, "--resume", "runs/whole", code=0)
    assert outcome(tmp_path / "runs/whole") == outcome(whole)
    assert (tmp_path / "runs/whole/curves.png").exists()
    table = [line for line in out.splitlines() if " -> " in line]
    assert len(table) > 1 and [line for line in result.stdout.splitlines() if " -> " in line] == table


def test_what_cannot_be_resumed_says_why_in_a_line_and_stays_as_it_is(run, skilled, monkeypatch):
    flags, folder = [*SMALL, "--model", skilled, "--run-name", "a"], Path("runs/a")
    run(PASS, *flags, code=0)
    before = outcome(folder)
    run(PASS, *flags, "--resume", "runs/a", code=0)  # the same arguments are welcome

    def refused(*command) -> str:
        ended = run(*command)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and outcome(folder) == before
        return ended.stderr.strip()

    other = "--lr 1 --steps 9 --eval-n 8 --save-every 1".split()
    assert refused(PASS, "--resume", "runs/a", *other).endswith("keeps its own arguments: leave out --lr, --eval-n")
    assert "runs/a is a run of pass_at_k_pg.py" in refused("majority_pg.py", "--resume", "runs/a")
    assert "runs/b is not a run folder" in refused(PASS, "--resume", "runs/b")
    saved = json.loads((folder / "args.json").read_text())
    newer = "a run of another version, whose flags and metrics have other names: start anew"
    without = {name: value for name, value in saved.items() if name != "files"}  # what came after the new names
    for args, why in (
        (without, newer), (saved | {"old_name": 1}, newer), ({"steps": 2}, "not a run folder: KeyError: 'script'"),
        ([1], "not a run folder: TypeError: 'str' object cannot be interpreted as an integer"),
    ):  # fmt: skip
        (folder / "args.json").write_text(json.dumps(args))
        assert refused(PASS, "--resume", "runs/a") == f"error: runs/a is {why}"
    (folder / "args.json").write_text(json.dumps(saved))
    path = folder / "checkpoint.pt"
    for content in (path.read_bytes()[:5000], b"", b"no checkpoint"):
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(harness.run, "load_policy", lambda *_: pytest.fail("told after the model is loaded"))
            line = refused(PASS, "--resume", "runs/a")
        assert line.startswith("error: runs/a/checkpoint.pt cannot be read (") and "delete it to begin anew" in line
    path.unlink()
    assert run(PASS, "--resume", "runs/a").returncode == 0 and outcome(folder) == before


def move_a_weight(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    next(model.parameters()).data[0, 0] += 1
    model.save_pretrained(folder)


def test_a_model_that_has_changed_is_no_matter_unless_its_size_has(run, tmp_path):
    """The policy and the reference of its KL are those of the checkpoint."""
    model = save_untrained(tmp_path / "model")
    for name, steps in (("whole", "3"), ("cut", "2")):
        flags = [*SMALL, "--log-kl", "--no-lr-decay", "--eval-every", "2", "--model", model, "--run-name", name]
        run(PASS, *flags, "--steps", steps, code=0)
    move_a_weight(model)
    run(PASS, "--resume", "runs/cut", "--steps", "3", code=0)
    assert outcome(Path("runs/cut")) == outcome(Path("runs/whole"))
    save_tiny("llama", model)
    line = run(PASS, "--resume", "runs/cut", "--steps", "4", code=2).stderr
    assert line == f"error: --model {model!r} has changed since runs/cut began: put it back, or start anew\n"


def test_runs_that_cannot_be_written_are_told_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    """A link to a disk that is not there, a file, and a folder of another user's."""
    monkeypatch.setattr(harness.run, "load_policy", lambda *_: pytest.fail("told after the model is loaded"))
    folder = tmp_path / "runs"
    for make in (lambda: folder.symlink_to("no_disk"), folder.touch, folder.mkdir):
        make()
        if folder.is_dir():
            monkeypatch.setattr(harness.run.os, "access", lambda path, mode: path != Path("runs"))
        line = run(PASS, *SMALL).stderr
        assert line.startswith(f"error: cannot write to {folder.resolve()}: ") and len(line.splitlines()) == 1
        folder.rmdir() if folder.is_dir() else folder.unlink()


def test_a_finished_run_goes_on_for_more_steps_by_the_schedule_of_the_new_total(run, skilled, monkeypatch, tmp_path):
    """The learning rate falls from .001 by a quarter a step, by an eighth from step 5 on; the first policy stays."""
    rates, step = [], common.policy_gradient_step
    noted = lambda *args: rates.append(args[1].param_groups[0]["lr"]) or step(*args)  # noqa: E731
    monkeypatch.setattr(common, "policy_gradient_step", noted)
    flags = [*SMALL, "--steps", "4", "--eval-every", "0", "--lr", "1e-3", "--model", skilled, "--run-name", "a"]
    run(PASS, *flags, code=0)
    first = outcome(tmp_path / "runs/a")
    result = run(PASS, "--resume", "runs/a", "--steps", "8", "--eval-every", "3", code=0)
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


@pytest.mark.parametrize("first", ["without schedules", "cut off before its first checkpoint"])
def test_a_longer_run_is_the_uninterrupted_one(first, run, skilled, monkeypatch):
    """It is, if no schedule has begun or nothing of it is left."""
    flags = [*SMALL, "--eval-every", "2", "--model", skilled, *["--no-lr-decay"] * (first == "without schedules")]
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(*STEP, at_call(2 if first.startswith("cut") else 99, raising(Killed()), getattr(*STEP)))
        run(PASS, *flags, "--steps", "2", "--run-name", "longer")
    assert Path("runs/longer/checkpoint.pt").exists() == (first == "without schedules")
    result = run(PASS, "--resume", "runs/longer", "--steps", "4", code=0)
    assert "schedules" not in result.stdout
    extended = json.loads(Path("runs/longer/args.json").read_text()).get("extended_after")
    assert extended == ([2] if first == "without schedules" else None)
    run(PASS, *flags, "--steps", "4", "--run-name", "whole", code=0)
    assert outcome(Path("runs/longer")) == outcome(Path("runs/whole"))


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
    run(RL, *SMALL, *schedule, "--model", untrained, "--run-name", "a", code=0)
    result = run(RL, "--resume", "runs/a", "--steps", "4", code=0)
    assert "from step 3 on, schedules follow 4 steps" in result.stdout
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
    run(PASS, *FLAGS, "--model", skilled, "--run-name", "two", code=0)
    log = [r for r in records(tmp_path / "runs/two") if "reward" in r]
    assert [r["skipped"] for r in log] == [0, 1, 1, 0, 0, 0] and log[1]["grad_norm"] is None
    weights = torch.cat([p.flatten() for p in harness.policy.load_policy("runs/two/policy", TASK).model.parameters()])
    assert weights.isfinite().all()
    calls.clear()
    bad = set(range(4, 99))
    flags = [*FLAGS, "--save-every", "20", "--steps", "30", "--model", skilled, "--run-name", "ten"]
    for command, step in ((flags, 13), (["--resume", "runs/ten"], 23)):
        result = run(PASS, *command)
        assert result.returncode == 2 and f"(step {step} is saved): lower --lr" in result.stderr
    bad = set()
    assert run(PASS, "--resume", "runs/ten").returncode == 0
    assert [r["step"] for r in records(tmp_path / "runs/ten") if "reward" in r] == [*range(1, 31)]


def test_a_full_log_is_a_clear_line(run, skilled, monkeypatch):
    write = harness.run.append_json
    monkeypatch.setattr(harness.run, "append_json", lambda _, record: write(Path("/dev/full"), record))
    result = run(PASS, *SMALL, "--model", skilled, code=2)
    assert result.stderr.splitlines()[-1].startswith("error: no space left on the disk of /dev/full")


def test_killed_while_the_learned_verifier_is_saved(run, skilled, monkeypatch, tmp_path):
    """The next resume trains it again, and later ones read it."""
    flags = [*FLAGS, "--steps", "2", "--verifier", "learned", "--verifier-problems", "32", "--model", skilled]
    flags += ["--verifier-lr", "0.02", "--run-name"]

    def half(verifier, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(harness.run, "save_policy", half)
        run(RL, *flags, "killed")
    rates, verifier = [], learned.trained_verifier
    noted = lambda *args, **others: rates.append(others["lr"]) or verifier(*args, **others)  # noqa: E731
    monkeypatch.setattr(learned, "trained_verifier", noted)
    for _ in range(2):
        assert "bon@2" in run(RL, "--resume", "runs/killed", code=0).stdout
        assert rates == [0.02]
    run(RL, *flags, "whole")
    assert rates == [0.02, 0.02] and outcome(tmp_path / "runs/killed") == outcome(tmp_path / "runs/whole")
