"""The real thing on a CUDA device: `python -m pytest -q -m gpu`, a few minutes; elsewhere all of it is skipped. What is
exact on the CPU is near here: float32 weights under bfloat16 autocast."""

import copy
import dataclasses
import json

import pytest
import torch
from runs import EXTRA, FLAGS, SCRIPTS, records, steps_of, weights_of
from test_sampler import PROMPTS, gradient, naive_log_probs, random_policy

import bon_rl
import common

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here has run"),
]


def sampled(policy: common.Policy) -> tuple[common.Rollouts, common.Rollouts]:
    """Rollouts on the device, where the policy is moved to, and the same on the CPU."""
    policy.model.to(DEVICE)
    rollouts = common.sample(policy, PROMPTS, 16, 12, 0.9, torch.Generator(DEVICE).manual_seed(0))
    tensors = {name: getattr(rollouts, name).cpu() for name in ("ids", "mask", "log_probs")}
    return rollouts, dataclasses.replace(rollouts, **tensors)


@pytest.mark.parametrize("clip", [None, 0.2], ids=["plain", "clipped"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_log_probs_and_gradients_in_bfloat16_are_near_those_of_float32(architecture, clip):
    """The log-probs of sampling, of training, and of the plain model; the gradient beside the one on the CPU."""
    policy, plain = random_policy(architecture), random_policy(architecture)
    rollouts, on_cpu = sampled(policy)
    prompts, ids, mask, log_p = rollouts.flat()
    with torch.no_grad():
        trained = common.response_log_probs(policy, prompts, ids, mask, 0.9)
        exact = naive_log_probs(plain, on_cpu, 0.9).flatten(0, 1)  # (B, n, T) -> (R, T)
    assert trained.dtype == log_p.dtype == torch.float32 and mask.sum() > 200
    assert (trained - log_p).abs().max() < 0.1 and (trained - log_p).abs().mean() < 0.01
    assert (exact - log_p.cpu()).abs().max() < 0.1
    A = torch.randn(rollouts.ids.shape[:2], generator=torch.Generator().manual_seed(0))
    got, wanted = (gradient(p, lambda: common.accumulate_gradient(p, r, A, clip)).cpu()
                   for p, r in ((policy, rollouts), (plain, on_cpu)))  # fmt: skip
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_kl_and_a_value_network():
    policy, plain = random_policy("llama"), random_policy("llama")
    rollouts, on_cpu = sampled(policy)
    assert (common.log_ratios(policy, copy.deepcopy(policy), rollouts) == 0).all()
    references = [copy.deepcopy(policy), copy.deepcopy(plain)]
    for p in (p for reference in references for p in reference.model.parameters()):
        p.data.mul_(1.1)
    got, wanted = common.log_ratios(policy, references[0], rollouts), common.log_ratios(plain, references[1], on_cpu)
    assert got.device.type == "cpu" and wanted.abs().max() > 0.1 and (got - wanted).abs().max() < 0.1
    value, rewards = bon_rl.ValueNetwork(policy), torch.tensor([1.0, 0.0, 0.5, 1.0])
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-2, fused=True)
    values, loss = value.fit(optimizer, policy, PROMPTS, rewards)
    assert values.tolist() == [0, 0, 0, 0] and loss == pytest.approx(2.25 / 4)
    for _ in range(100):
        values, loss = value.fit(optimizer, policy, PROMPTS, rewards)
    assert values.tolist() == pytest.approx(rewards.tolist(), abs=0.1) and loss < 0.01


PASS, MAJ, RL, SFT = SCRIPTS
LEARNED = ["--verifier", "learned", "--verifier-problems", "400"]
STEPS = [
    (PASS, ["--estimator", "unbiased", "--epochs", "2", "--clip", "0.1", "--kl-coef", "0.1"]),
    *((PASS, ["--k", "3", "--estimator", x]) for x in ("mean", "biased", "maxrl")),
    *((MAJ, ["--k", "3", "--estimator", x]) for x in ("mean", "unbiased", "biased")),
    (RL, EXTRA[RL]),
    (RL, ["--estimator", "mean", "--baseline", "value", "--epochs", "2"]),
    (RL, ["--estimator", "exact", *LEARNED]),
    *((RL, ["--estimator", x]) for x in ("rlb", "rlb-p", "rlb-all")),
    (SFT, ["--N", "1"]),
    (SFT, LEARNED),
    (SFT, ["--likelihood", "exact"]),
]


@pytest.mark.parametrize("script, own", STEPS, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_steps_of_each_script(script, own, run, skilled, tmp_path):
    """Two steps with every loss have a gradient, and none is skipped."""
    flags = [*FLAGS, *"--steps 2 --prompts-per-step 32 --run-name a --device".split(), DEVICE, "--model", skilled]
    run(script, *flags, *own, code=0)
    log, timings = steps_of(tmp_path / "runs/a"), (tmp_path / "runs/a/timings.jsonl").read_text().splitlines()
    assert all(r["nonzero_advantage"] > 0 and r["grad_norm"] > 0 and not r["skipped"] for r in log) and len(log) == 2
    assert json.loads(timings[-1])["peak_memory_mib"] > 1
    moved = weights_of("runs/a/policy") - weights_of(skilled)
    assert moved.isfinite().all() and moved.norm() > 0


def test_a_checkpoint_is_resumed(run, skilled, tmp_path):
    """A run cut off after step 4 of 6 ends near the uninterrupted one, nearer than without the optimizer's state."""
    flags = [*FLAGS, *"--k 4 --n 8 --prompts-per-step 16 --lr 1e-2 --no-lr-decay --device".split(), DEVICE]
    flags += ["--model", skilled, "--run-name"]
    run(PASS, *flags, "whole", code=0)
    run(PASS, *flags, "cut", "--steps", "4", code=0)
    result = run(PASS, "--resume", "runs/cut", "--steps", "6", code=0)
    assert "resuming at step 4" in result.stdout
    whole, cut = tmp_path / "runs/whole", tmp_path / "runs/cut"
    first, second = steps_of(whole), steps_of(cut)
    assert [r["step"] for r in second] == [1, 2, 3, 4, 5, 6] and records(cut)[0] == records(whole)[0]
    assert [r["reward"] for r in second[4:]] == pytest.approx([r["reward"] for r in first[4:]], abs=0.1)
    start, end, resumed = map(weights_of, (skilled, whole / "policy", cut / "policy"))
    assert (resumed - end).norm() < 0.2 * (end - start).norm()
