"""Several processes on the CPU (gloo): the gradient of the whole batch, one folder, one log."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
from test_cli import ROOT, SCRIPTS, SMALL, of_script, save_untrained
from test_resume import EXTRA, FLAGS, model, outcome  # noqa: F401 (model: a fixture)
from test_sampler import random_policy, rollouts_of

STEP = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import os, torch, torch.distributed as dist
from types import SimpleNamespace
import common
from test_sampler import random_policy
dist.init_process_group("gloo")
policy, anchor = random_policy("llama"), random_policy("llama")
if {fsdp}:
    common.shard("cpu", policy, anchor)
prompts, ids, mask, log_probs, A = torch.load({data!r}, weights_only=False)
rank, size = common.world()
mine = common.Rollouts(common.share(prompts), *(x[rank::size] for x in (ids, mask, log_probs)))
optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0, momentum=0.9)
assert all(isinstance(x, common.DTensor) == {fsdp} for x in policy.model.parameters())
args = SimpleNamespace(temperature=1.0, micro_batch_tokens=64, max_grad_norm=1e9)
with common.gathered(anchor.model):  # as often as each likes: the others do not wait
    for _ in range(1 + rank):
        common.sample(anchor, prompts[rank:], 1 + rank, 3)
common.policy_gradient_step(policy, optimizer, mine, A[rank::size], args)
momentum = common.whole(optimizer.state_dict())
common.load_whole(optimizer, momentum)
assert str(common.whole(optimizer.state_dict())) == str(momentum)
state = common.whole(policy.model.state_dict())
common.load_whole(policy.model, state)
common.move_towards(anchor, policy, 1.0)  # what was gathered of it before is old now
with torch.no_grad(), common.gathered(anchor.model):
    state["log_p"] = common.response_log_probs(anchor, prompts, ids[:, 0], mask[:, 0])
torch.save(state, {data!r} + str(rank))
record = {{"step": 3, "reward": float(rank), "timeouts": 1 + rank, "seconds": float(rank)}}
print(common.global_record(record), flush=True)
dist.destroy_process_group()  # or the interpreter may abort at its end, with gloo's threads still there
"""


def torchrun(*command, cwd) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_take_the_step_of_one(fsdp, tmp_path):
    policy = random_policy("llama")
    rollouts = rollouts_of(policy)
    A = torch.randn(rollouts.mask.shape[:2], generator=torch.Generator().manual_seed(0))
    data = str(tmp_path / "data")
    torch.save((rollouts.prompts, rollouts.ids, rollouts.mask, rollouts.log_probs, A), data)
    (tmp_path / "step.py").write_text(STEP.format(root=str(ROOT), tests=str(ROOT / "tests"), data=data, fsdp=fsdp))
    process = torchrun(tmp_path / "step.py", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("{'step': 3, 'reward': 0.5, 'timeouts': 3, 'seconds': 1.0}") == 2
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    args = type("Args", (), {"temperature": 1.0, "micro_batch_tokens": 64, "max_grad_norm": 1e9})()
    common.policy_gradient_step(policy, optimizer, rollouts, A, args)
    first, second = (torch.load(data + rank, weights_only=True) for rank in "01")
    with torch.no_grad():
        log_p = common.response_log_probs(policy, rollouts.prompts, rollouts.ids[:, 0], rollouts.mask[:, 0])
    before["log_p"] = rollouts.log_probs[:, 0]
    for name, alone in {**policy.model.state_dict(), "log_p": log_p}.items():
        assert torch.equal(first[name], second[name]) and not torch.equal(alone, before[name])
        torch.testing.assert_close(first[name], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script, fsdp", [
    (SCRIPTS[0], ("--fsdp",)), pytest.param(SCRIPTS[0], (), marks=pytest.mark.slow),
    *(pytest.param(name, flags, marks=pytest.mark.slow) for name in SCRIPTS[1:] for flags in ((), ("--fsdp",))),
])
def test_a_run_of_two_processes_killed_and_resumed(script, fsdp, model, tmp_path):  # noqa: F811
    """One folder, global metrics, and bit for bit what an uninterrupted run of two processes leaves."""
    flags = [*fsdp, *FLAGS, "--save-every", "2", *EXTRA.get(script, []), "--model", model]
    if fsdp and "value" in flags:  # the value network is not sharded
        flags[flags.index("value")] = "loo"
    flags = [of_script(script, flag) for flag in flags]
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    process = torchrun(ROOT / script, *flags, "--run-name", "whole", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("writing to runs/whole") == 1 and sorted(os.listdir(tmp_path / "runs")) == ["whole"]
    log = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    process = torchrun(ROOT / script, *flags, "--run-name", "killed", cwd=tmp_path)
    while process.poll() is None and not [*killed.glob("checkpoints/*.pt")]:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = torchrun(ROOT / script, "--resume", "runs/killed", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
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
