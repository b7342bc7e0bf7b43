"""Several processes on the CPU (gloo): the gradient of the whole batch, one folder, one log."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import ROOT, SCRIPTS, SMALL, of_script, save_untrained
from test_resume import EXTRA, FLAGS, model, outcome  # noqa: F401 (model: a fixture)
from test_sampler import random_policy, rollouts_of

import common

STEP = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
import common, harness.parallel as parallel
from test_sampler import random_policy
parallel.start("cpu")
policy = random_policy("llama")
prompts, ids, mask, log_probs, A = torch.load({data!r}, weights_only=False)
rank, size = parallel.world()
mine = common.Rollouts(parallel.share(prompts), *(x[rank::size] for x in (ids, mask, log_probs)))
optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
common.policy_gradient_step(policy, optimizer, mine, A[rank::size], 1e9, average_gradients=parallel.average_gradients)
torch.save(policy.model.state_dict(), {data!r} + str(rank))
record = {{"step": 3, "reward": float(rank), "timeouts": 1 + rank, "seconds": float(rank)}}
print(parallel.global_record(record), file=sys.stderr, flush=True)
parallel.stop()  # or the interpreter may abort at its end, with gloo's threads still there
"""


def torchrun(*command, cwd) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_take_the_step_of_one(tmp_path):
    policy = random_policy("llama")
    rollouts = rollouts_of(policy)
    A = torch.randn(rollouts.mask.shape[:2], generator=torch.Generator().manual_seed(0))
    data = str(tmp_path / "data")
    torch.save((rollouts.prompts, rollouts.ids, rollouts.mask, rollouts.log_probs, A), data)
    (tmp_path / "step.py").write_text(STEP.format(root=str(ROOT), tests=str(ROOT / "tests"), data=data))
    process = torchrun(tmp_path / "step.py", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("{'step': 3, 'reward': 0.5, 'timeouts': 3, 'seconds': 1.0}") == 2
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    common.policy_gradient_step(policy, optimizer, rollouts, A, 1e9)
    first, second = (torch.load(data + rank, weights_only=True) for rank in "01")
    for name, alone in policy.model.state_dict().items():
        assert torch.equal(first[name], second[name]) and not torch.equal(alone, before[name])
        torch.testing.assert_close(first[name], alone, rtol=1e-5, atol=1e-5)


def workers_of(launcher: int) -> list[int]:
    """The processes that a torchrun launcher has started, each in a session of its own."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SCRIPTS[1:])])
def test_a_run_of_two_processes_killed_and_resumed(script, model, tmp_path):  # noqa: F811
    """One folder, global metrics, and bit for bit what an uninterrupted run of two processes leaves."""
    flags = [*FLAGS, "--save-every", "2", *EXTRA.get(script, []), "--model", model]
    flags = [of_script(script, flag) for flag in flags]
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    process = torchrun(ROOT / script, *flags, "--run-name", "whole", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("writing to runs/whole") == 1 and sorted(os.listdir(tmp_path / "runs")) == ["whole"]
    log = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6] and any(r.get("signal") for r in log)
    process = torchrun(ROOT / script, *flags, "--run-name", "killed", cwd=tmp_path)
    while process.poll() is None and not (killed / "checkpoint.pt").exists():
        time.sleep(0.01)
    for worker in workers_of(process.pid):  # the launcher's group has not got them
        os.kill(worker, signal.SIGKILL)
    process.communicate()
    assert not (killed / "policy").exists(), "the run had come to its end: there is nothing to resume"
    result = subprocess.run([sys.executable, str(ROOT / script), "--resume", "runs/killed"], cwd=tmp_path,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 2 and "is a run of 2 processes: torchrun --nproc-per-node 2 -- " in result.stderr
    process = torchrun(ROOT / script, "--resume", "runs/killed", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming at step" in out, err
    assert outcome(killed) == outcome(whole)


def test_a_rank_that_fails_ends_the_run_with_its_error(tmp_path):
    """Rank 1 has no such model: its error is shown, and rank 0, which waits for it, does not hang."""
    good = save_untrained(tmp_path / "model")
    script = tmp_path / "pass_at_k_pg.py"
    script.write_text((ROOT / "pass_at_k_pg.py").read_text().replace(
        "import common\n", f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n"
        "if os.environ['RANK'] == '1':\n    sys.argv[sys.argv.index('--model') + 1] = 'no/such'\n", 1))  # fmt: skip
    process = torchrun(script, *SMALL, "--model", good, cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "error in rank 1: cannot load --model 'no/such'" in err


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    process = torchrun(ROOT / "pass_at_k_pg.py", *SMALL, "--prompts-per-step", "3", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "--prompts-per-step must be a multiple of the 2 processes, not 3" in err
