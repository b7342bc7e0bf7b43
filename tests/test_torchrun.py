"""Several processes on the CPU (gloo): the gradient of the whole batch, one folder, one log."""

import dataclasses
import os
import signal
import sys

import pytest
import runs
import torch
import torch.distributed as dist
from runs import EXTRA, FLAGS, ROOT, SCRIPTS, SMALL, outcome, parity, records, steps_of
from test_resume import raising, sending
from test_sampler import random_policy, rollouts_of

import common
import harness.parallel
import harness.policy
import harness.run
from verifiers import arithmetic, learned


def policy_and_rollouts():
    """The same in every process, with advantages (B, n)."""
    policy = random_policy("llama")
    rollouts = rollouts_of(policy)
    return policy, rollouts, 1e3 * torch.randn(rollouts.mask.shape[:2], generator=torch.Generator().manual_seed(0))


def test_two_processes_take_the_step_of_one(tmp_path):
    def step():
        harness.parallel.start("cpu")
        (policy, rollouts, A), (rank, size) = policy_and_rollouts(), harness.parallel.world()
        tensors = (x[rank::size] for x in (rollouts.ids, rollouts.mask, rollouts.log_probs))
        mine = common.Rollouts(harness.parallel.shard(rollouts.prompts), *tensors)
        optimizer, average = torch.optim.SGD(policy.model.parameters()), harness.parallel.average_gradients
        common.policy_gradient_step(policy, optimizer, mine, A[rank::size], 1e9, average_gradients=average)
        torch.save(policy.model.state_dict(), f"weights-{rank}")
        counts = [{"timeouts": 1}, {"timeouts": 2, "late": 2}][rank]
        print(harness.parallel.reduce_metrics({"reward": float(rank)}, counts), file=sys.stderr, flush=True)
        harness.parallel.stop()  # or the interpreter may abort at its end, with gloo's threads still there

    _, err = runs.in_two_processes(step, tmp_path)
    assert err.count("{'reward': 0.5, 'timeouts': 3, 'late': 2}") == 2
    policy, rollouts, A = policy_and_rollouts()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    common.policy_gradient_step(policy, torch.optim.SGD(policy.model.parameters()), rollouts, A, 1e9)
    first, second = (torch.load(tmp_path / f"weights-{rank}", weights_only=True) for rank in (0, 1))
    for name, alone in policy.model.state_dict().items():
        assert torch.equal(first[name], second[name]) and not torch.equal(alone, before[name])
        torch.testing.assert_close(first[name], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SCRIPTS[1:])])
def test_a_run_of_two_processes_interrupted_and_resumed(script, untrained, run, refused, monkeypatch, tmp_path):
    """One folder, global metrics, and bit for bit what an uninterrupted run of two processes leaves. Only the first
    process has a held-out problem: its samples are all there are, those of a run of one process.
    First both processes die in step 5, with checkpoints after steps 2 and 4. Then rank 1 alone is told to stop. Then
    the verifier of rank 1 alone raises, in its second call, which follows the trial."""
    flags = [*FLAGS, *EXTRA.get(script, []), *"--eval-problems 1 --eval-n 32 --model".split(), untrained]
    whole, cut, step = tmp_path / "runs/whole", tmp_path / "runs/cut", common.policy_gradient_step

    def both(*flags, step=step, verify=parity, code=0):
        monkeypatch.setattr(common, "policy_gradient_step", step)
        monkeypatch.setattr(arithmetic, "verify", verify)
        return runs.in_two_processes(runs.as_main(script, *flags), tmp_path, code)

    out, _ = both(*flags, "--run-name", "whole")
    assert out.count("writing to runs/whole") == 1 and os.listdir(tmp_path / "runs") == ["whole"]
    log = steps_of(whole)
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6] and sum(r["nonzero_advantage"] > 0 for r in log) >= 3
    run(script, *flags, "--steps", "0", "--run-name", "alone", code=0)
    alone, together = (records(tmp_path / "runs" / name)[0] for name in ("alone", "whole"))
    assert alone == together and 0 < alone["eval"]["all"]["pass@1"][0] < 1

    killed = runs.at_call(5, sending(signal.SIGKILL), step)
    both(*flags, "--run-name", "cut", step=killed, code=-signal.SIGKILL)
    command = f"torchrun --nproc-per-node 2 -- {ROOT / script} --resume runs/cut"
    assert refused(script, "--resume", "runs/cut").endswith(f"is a run of 2 process(es): {command}")  # by one process
    told = runs.at_call(1, sending(signal.SIGTERM), step, rank=1)
    out, _ = both("--resume", "runs/cut", step=told, code=None)
    assert "resuming at step 4" in out and f"stopped after step 5; to go on:\n{command}\n" in out
    broken = runs.at_call(2, raising(ZeroDivisionError("what a verifier says")), parity, rank=1)
    _, err = both("--resume", "runs/cut", verify=broken, code=None)
    assert "ZeroDivisionError: what a verifier says" in err and not (cut / "policy").exists()
    out, _ = both("--resume", "runs/cut")
    assert "resuming at step 5" in out and outcome(cut) == outcome(whole)


def test_what_one_process_makes_for_all_does_not_hang(noted, monkeypatch, tmp_path):
    """A cold cache: the first process alone trains `tiny` and the verifier, each once, and the other waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for owner, name in ((harness.policy, "warm_start"), (learned, "trained_verifier")):
        noted(owner, name, lambda *_, name=name, **__: print("rank", os.environ["RANK"], name, file=sys.stderr))
    load, recipe = arithmetic.load, {"steps": 2, "batch": 8, "lr": 1e-3}
    monkeypatch.setattr(arithmetic, "load", lambda *args: dataclasses.replace(load(*args), warm_start=recipe))
    monkeypatch.setattr(arithmetic, "verify", parity)
    flags = [*SMALL, *"--steps 1 --run-name a --model tiny --verifier learned --verifier-problems 8".split()]
    out, err = runs.in_two_processes(runs.as_main("bon_rl.py", *flags), tmp_path)
    made = [line for line in err.splitlines() if line.startswith("rank ")]
    assert made == ["rank 0 warm_start", "rank 0 trained_verifier"] and "bon@2" in out
    assert steps_of(tmp_path / "runs/a")[0]["nonzero_advantage"] > 0


@pytest.mark.parametrize("device, there, to", [("cpu", True, "gloo"), ("auto", True, "nccl"), ("auto", False, "gloo")])
def test_processes_talk_where_the_policy_is(device, there, to, monkeypatch):
    """--device cpu means gloo on a machine with a GPU as well. The patience is more than what a warm start takes."""
    joined, placed = [], []
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", placed.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: joined.append((backend, timeout)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    harness.parallel.start(device)
    assert joined == [(to, harness.parallel.PATIENCE)] and placed == [1] * (to == "nccl")
    assert harness.parallel.PATIENCE.total_seconds() >= 3600


def test_a_process_says_which_one_fails(untrained, run, refused, monkeypatch):
    """Rank 1 has no such model. Rank 0 cannot share the batch, and says when rank 1's verifier raised what is saved."""
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "world", lambda: (1, 2))
        stderr = run("pass_at_k_pg.py", *SMALL, "--model", "no/such", code=2).stderr
        assert "error in rank 1: cannot load --model 'no/such'" in stderr
        patch.setattr(harness.run, "world", lambda: (0, 2))
        line = refused("pass_at_k_pg.py", *SMALL, "--prompts-per-step", "3", "--model", "no/such")
        assert "--prompts-per-step must be a multiple of the 2 processes, not 3" in line
    monkeypatch.setattr(harness.run, "all_gather", lambda mine: [mine] if mine is not None else [None, "KeyError: 'x'"])
    stderr = run("pass_at_k_pg.py", *SMALL, "--model", untrained, "--run-name", "a", code=2).stderr
    line = "error: the verifier raised in rank 1: KeyError: 'x' (step 0 is saved: mend it, then --resume runs/a)"
    assert stderr.splitlines()[-1] == line
