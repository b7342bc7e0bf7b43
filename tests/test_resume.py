"""Runs that are stopped, killed, or meet faults, and what is lost: nothing."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from model_zoo import save_tiny
from runs import FLAGS, SCRIPTS, SMALL, at_call, outcome, records, save_untrained, weights_of
from transformers import LlamaForCausalLM

import common
import harness.policy
import harness.report
import harness.run
from verifiers import arithmetic, learned

PASS, RL = "pass_at_k_pg.py", "bon_rl.py"


class Killed(BaseException):
    """The end of a script in the middle of a step, with nothing done after it."""


def raising(error, written=b""):
    """An action that raises; where it is torch.save's, with a part of the file written."""

    def action(*args):
        if written:
            args[1].write(written)
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
    "SIGHUP": (PASS, STEP, 3, sending(signal.SIGHUP), 129, STOPPED, 3),
    "SIGTERM": (PASS, STEP, 3, sending(signal.SIGTERM), 143, STOPPED, 3),
    "a second SIGINT": (PASS, STEP, 3, sending(signal.SIGINT, times=2), 130, "--resume the folder that it was", 2),
    "killed in a checkpoint": (PASS, SAVE, 2, raising(Killed(), b"half of it"), Killed, "", 2),
    "a full disk": (PASS, SAVE, 2, raising(FULL, b"half of it"), 2, SAVED, 2),
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
    assert f"resuming at step {step}" in run(script, "--resume", "runs/cut", code=0).stdout
    assert outcome(Path("runs/cut")) == outcome(whole)


def test_a_finished_run_can_be_resumed_for_what_is_missing(uninterrupted, run):
    """A run may have died after its last step."""
    whole, _, out = uninterrupted(RL)
    folder = shutil.copytree(whole, Path("runs/whole"))
    shutil.rmtree(folder / "policy")
    (folder / "curves.png").unlink()
    again = run(RL, "--resume", "runs/whole", code=0).stdout
    assert outcome(folder) == outcome(whole) and (folder / "curves.png").exists()
    table, same = ([line for line in text.splitlines() if " -> " in line] for text in (out, again))
    assert len(table) > 1 and same == table


def test_what_cannot_be_resumed_says_why_in_a_line_and_stays_as_it_is(run, refused, skilled, monkeypatch):
    flags, folder = [*SMALL, "--model", skilled, "--run-name", "a"], Path("runs/a")
    run(PASS, *flags, code=0)
    before = outcome(folder)
    run(PASS, *flags, "--resume", "runs/a", code=0)  # the same arguments are welcome

    def why(*flags, script=PASS) -> str:
        line = refused(script, "--resume", *flags)
        assert outcome(folder) == before
        return line

    other = "--lr 1 --steps 9 --eval-n 8 --save-every 1".split()
    assert why("runs/a", *other).endswith("keeps its own arguments: leave out --lr, --eval-n")
    assert "runs/a is a run of pass_at_k_pg.py" in why("runs/a", script="majority_pg.py")
    assert "runs/b is not a run folder" in why("runs/b")
    saved = json.loads((folder / "args.json").read_text())
    newer = "a run of another version, whose flags and metrics have other names: start anew"
    without = {name: value for name, value in saved.items() if name != "files"}  # what came after the new names
    no_run = "not a run folder: KeyError: 'script'"
    no_table = "not a run folder: TypeError: 'str' object cannot be interpreted as an integer"
    told = (without, newer), (saved | {"old_name": 1}, newer), ({"steps": 2}, no_run), ([1], no_table)
    for args, reason in told:
        (folder / "args.json").write_text(json.dumps(args))
        assert why("runs/a") == f"error: runs/a is {reason}"
    for name, value in (("steps", "2"), ("lr", None), ("levels", 3)):
        (folder / "args.json").write_text(json.dumps(saved | {name: value}))
        assert f"runs/a/args.json has {name} = {value!r}: put back" in why("runs/a")
    (folder / "args.json").write_text(json.dumps(saved))
    with harness.run.written_by_one(folder):
        assert why("runs/a") == "error: another process writes to runs/a: wait for its end, or stop it"
    with monkeypatch.context() as patch, harness.run.written_by_one(folder):
        patch.setattr(harness.run.fcntl, "flock", raising(OSError(errno.EBADF, "no locks here")))
        with harness.run.written_by_one(folder):  # as on some network file systems
            pass
    log = folder / "timings.jsonl"
    content = log.read_bytes()
    log.write_bytes(content[:-9])
    assert "timings.jsonl is shorter than at the last checkpoint" in why("runs/a") and log.stat().st_size > 9
    log.write_bytes(content)
    path = folder / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    torch.save(whole | {"state": {"policy": 3, "optimizer": {}}}, path)
    assert "checkpoint.pt is none of this run (" in why("runs/a")
    torch.save(whole | {"state": {"other": {}}}, path)
    assert "checkpoint.pt is none of this run (KeyError: 'policy')" in why("runs/a")
    torch.save(whole, path)
    contents = [path.read_bytes()[:5000], b"", b"no checkpoint"]
    for other in ({}, [1], {"progress": {"step": "2"}, "state": {}}):
        torch.save(other, folder / "other.pt")
        contents.append((folder / "other.pt").read_bytes())
    for content in contents:
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(harness.run, "load_policy", lambda *_: pytest.fail("told after the model is loaded"))
            line = why("runs/a")
        assert line.startswith("error: runs/a/checkpoint.pt cannot be read (") and "delete it to begin anew" in line
    path.unlink()
    run(PASS, "--resume", "runs/a", code=0)
    assert outcome(folder) == before


def test_a_model_that_has_changed_is_no_matter_unless_its_size_has(run, refused, tmp_path):
    """The policy and the reference of its KL are those of the checkpoint."""
    model = save_untrained(tmp_path / "model")
    for name, steps in (("whole", "3"), ("cut", "2")):
        flags = [*SMALL, "--log-kl", "--no-lr-decay", "--eval-every", "2", "--model", model, "--run-name", name]
        run(PASS, *flags, "--steps", steps, code=0)
    moved = LlamaForCausalLM.from_pretrained(model)
    next(moved.parameters()).data[0, 0] += 1
    moved.save_pretrained(model)
    run(PASS, "--resume", "runs/cut", "--steps", "3", code=0)
    assert outcome(Path("runs/cut")) == outcome(Path("runs/whole"))
    save_tiny("llama", model)
    line = refused(PASS, "--resume", "runs/cut", "--steps", "4")
    assert line == f"error: --model {model!r} has changed since runs/cut began: put it back, or start anew"


def test_runs_that_cannot_be_written_are_told_before_the_model_is_loaded(refused, tmp_path, monkeypatch):
    """A link to a disk that is not there, a file, and a folder of another user's."""
    monkeypatch.setattr(harness.run, "load_policy", lambda *_: pytest.fail("told after the model is loaded"))
    folder = tmp_path / "runs"
    for make in (lambda: folder.symlink_to("no_disk"), folder.touch, folder.mkdir):
        make()
        if folder.is_dir():
            monkeypatch.setattr(harness.run.os, "access", lambda path, mode: path != Path("runs"))
        assert refused(PASS, *SMALL).startswith(f"error: cannot write to {folder.resolve()}: ")
        folder.rmdir() if folder.is_dir() else folder.unlink()


def test_a_finished_run_goes_on_for_more_steps_by_the_schedule_of_the_new_total(run, refused, skilled, noted):
    """The learning rate falls from .001 by a quarter a step, by an eighth from step 5 on; the first policy stays."""
    folder, rates = Path("runs/a"), noted(*STEP, lambda policy, optimizer, *_: optimizer.param_groups[0]["lr"])
    flags = [*SMALL, "--steps", "4", "--eval-every", "0", "--lr", "1e-3", "--model", skilled, "--run-name", "a"]
    run(PASS, *flags, code=0)
    first = outcome(folder)
    out = run(PASS, "--resume", "runs/a", "--steps", "8", "--eval-every", "3", code=0).stdout
    assert rates == pytest.approx([x / 1000 for x in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])
    said = "from step 5 on, schedules follow 8 steps, no longer 4:"
    assert out.splitlines()[:2] == [said, "the result is not the one of an uninterrupted run of 8 steps"]
    steps, evaluations = ([r["step"] for r in records(folder) if x in r] for x in ("loss", "eval"))
    assert steps == [*range(1, 9)] and evaluations == [0, 4, 6, 8]
    last, args = outcome(folder), json.loads((folder / "args.json").read_text())
    assert (folder / "policy-4/model.safetensors").read_bytes() == first[-1] != last[-1]
    assert (args["steps"], args["eval_every"], args["extended_after"], args["resume"]) == (8, 3, [4], None)
    assert "schedules" not in run(PASS, "--resume", "runs/a", code=0).stdout  # its arguments are now these
    assert outcome(folder) == last
    line = refused(PASS, "--resume", "runs/a", "--steps", "7")
    assert line == "error: runs/a has done 8 steps: --steps must be 8 or more, not 7"
    assert outcome(folder) == last and json.loads((folder / "args.json").read_text()) == args
    shutil.copytree(folder / "policy", folder / "policy-8")  # of a longer run that was killed, and shortened again
    run(PASS, "--resume", "runs/a", "--steps", "9", code=0)
    assert (folder / "policy-8/model.safetensors").read_bytes() == last[-1]


@pytest.mark.parametrize("first", ["without schedules", "cut off before its first checkpoint"])
def test_a_longer_run_is_the_uninterrupted_one(first, run, skilled, monkeypatch):
    """It is, if no schedule has begun or nothing of it is left."""
    flags = [*SMALL, "--eval-every", "2", "--model", skilled, *["--no-lr-decay"] * (first == "without schedules")]
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(*STEP, at_call(2 if first.startswith("cut") else 99, raising(Killed()), getattr(*STEP)))
        run(PASS, *flags, "--steps", "2", "--run-name", "longer")
    assert Path("runs/longer/checkpoint.pt").exists() == (first == "without schedules")
    assert "schedules" not in run(PASS, "--resume", "runs/longer", "--steps", "4", code=0).stdout
    extended = json.loads(Path("runs/longer/args.json").read_text()).get("extended_after")
    assert extended == ([2] if first == "without schedules" else None)
    run(PASS, *flags, "--steps", "4", "--run-name", "whole", code=0)
    assert outcome(Path("runs/longer")) == outcome(Path("runs/whole"))


@pytest.mark.parametrize("flags, after", [([], [0.5, 0.4]), (["--kl-anneal-steps", "8"], [0.65, 0.6])])
def test_the_coefficient_of_the_kl_follows_the_new_total(flags, after, run, untrained, noted, monkeypatch):
    """It moves from .8 to .4 over 2 steps, and over 4 from the third on; over --kl-anneal-steps where they are given.
    Without a reward, and with 1 in place of the KL's advantages, it is what a step trains on."""
    betas = noted(*STEP, lambda policy, optimizer, rollouts, A, *_: A.unique().item())
    monkeypatch.setattr(common, "kl_advantages", lambda ratios: torch.ones(ratios.shape[:2]))
    schedule = ["--kl-coef", "0.8", "--kl-coef-end", "0.4", "--kl-delay", "0", "--no-lr-decay", *flags]
    run(RL, *SMALL, *schedule, "--model", untrained, "--run-name", "a", code=0)
    said = run(RL, "--resume", "runs/a", "--steps", "4", code=0).stdout
    assert "from step 3 on, schedules follow 4 steps" in said
    assert betas == pytest.approx([*([0.75, 0.7] if flags else [0.6, 0.4]), *after])


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(run, skilled, monkeypatch, tmp_path):
    gradient, calls = common.accumulate_gradient, []

    def sometimes_nan(policy, *args):
        loss = gradient(policy, *args)
        calls.append(1)
        if len(calls) in bad:
            next(policy.model.parameters()).grad.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(common, "accumulate_gradient", sometimes_nan)
    bad = {3, 6}  # the first of the two epochs of step 2, and the second of step 3
    run(PASS, *FLAGS, "--epochs", "2", "--model", skilled, "--run-name", "two", code=0)
    log = [r for r in records(tmp_path / "runs/two") if "reward" in r]
    assert [r["skipped"] for r in log] == [0, 1, 1, 0, 0, 0] and [r["grad_norm"] for r in log].index(None) == 2
    assert weights_of("runs/two/policy").isfinite().all()
    calls.clear()
    bad = set(range(4, 99))
    flags = [*FLAGS, "--save-every", "20", "--steps", "30", "--model", skilled, "--run-name", "ten"]
    for command, step in ((flags, 13), (["--resume", "runs/ten"], 23)):
        assert f"(step {step} is saved): lower --lr" in run(PASS, *command, code=2).stderr
    bad = set()
    run(PASS, "--resume", "runs/ten", code=0)
    assert [r["step"] for r in records(tmp_path / "runs/ten") if "reward" in r] == [*range(1, 31)]


def test_a_full_log_is_a_clear_line(run, skilled, monkeypatch):
    write = harness.run.append_json
    monkeypatch.setattr(harness.run, "append_json", lambda _, record: write(Path("/dev/full"), record))
    *_, line = run(PASS, *SMALL, "--model", skilled, code=2).stderr.splitlines()
    assert line.startswith("error: no space left on the disk of /dev/full")


def test_killed_while_the_learned_verifier_is_saved(run, skilled, noted, monkeypatch, tmp_path):
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
    rates = noted(learned, "trained_verifier", lambda *_, lr, **__: lr)
    for _ in range(2):
        assert "bon@2" in run(RL, "--resume", "runs/killed", code=0).stdout
        assert rates == [0.02]
    run(RL, *flags, "whole")
    assert rates == [0.02, 0.02] and outcome(tmp_path / "runs/killed") == outcome(tmp_path / "runs/whole")
