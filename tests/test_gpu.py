"""The real thing on a CUDA device, where there is one: `python -m pytest -q -m gpu`, a few minutes.

Elsewhere all of it is skipped. What is exact on the CPU is near here: float32 weights under bfloat16 autocast.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import EXTRA, FLAGS, ROOT, SCRIPTS, records, steps_of
from safetensors.torch import load_file
from test_sampler import ARCHITECTURES, naive_log_probs, random_policy
from transformers import LlamaConfig, LlamaForCausalLM

import common

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here has run"),
]


def flat_weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten() for _, x in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_of_sampling_and_of_training_agree_in_bfloat16(architecture):
    """With each other, and with those of the plain model in float32; their gradient is near that of float32."""
    policy = random_policy(architecture)
    policy.model.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    rollouts = common.sample(policy, [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7]], 16, 12, 0.9, generator)
    prompts, ids, mask, sampled = rollouts.flat()
    with torch.no_grad():
        trained = common.response_log_probs(policy, prompts, ids, mask, 0.9)
    assert trained.dtype == sampled.dtype == torch.float32 and mask.sum() > 200
    assert (trained - sampled).abs().max() < 0.1 and (trained - sampled).abs().mean() < 0.01
    policy.model.cpu()
    on_cpu = common.Rollouts(rollouts.prompts, rollouts.ids.cpu(), rollouts.mask.cpu(), rollouts.log_probs.cpu(), 0.9)
    with torch.no_grad():
        plain = naive_log_probs(policy, on_cpu, 0.9).flatten(0, 1)  # (B, n, T) -> (R, T)
    assert (plain - sampled.cpu()).abs().max() < 0.1


def test_tokens_do_not_depend_on_the_rows_sampled_at_once_but_for_rounding():
    """In bfloat16 another batch rounds otherwise, and a token may differ: few do."""
    policy = random_policy("qwen2")
    policy.model.to(DEVICE)
    ids = []
    for policy.sample_rows in (1000, 7):
        ids.append(common.sample(policy, [[5, 6, 7]], 64, 8, 1.0, torch.Generator(DEVICE).manual_seed(0)).ids)
    T = min(x.shape[-1] for x in ids)
    assert (ids[0][..., 0] == ids[1][..., 0]).float().mean() > 0.95
    assert (ids[0][..., :T] == ids[1][..., :T]).all(-1).float().mean() > 0.8


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_of_each_script(script, run, skilled, tmp_path):
    flags = [*FLAGS, *EXTRA.get(script, []), "--steps", "2", "--model", skilled, "--device", DEVICE, "--run-name", "a"]
    result = run(script, *flags)
    assert result.returncode == 0, result.stderr
    log, timings = steps_of(tmp_path / "runs/a"), (tmp_path / "runs/a/timings.jsonl").read_text().splitlines()
    assert any(r["nonzero_advantage"] > 0 and r["grad_norm"] > 0 for r in log) and not any(r["skipped"] for r in log)
    assert json.loads(timings[-1])["peak_memory_mib"] > 1
    moved = flat_weights(tmp_path / "runs/a/policy") - flat_weights(Path(skilled))
    assert moved.isfinite().all() and moved.norm() > 0


def test_a_checkpoint_is_resumed(run, skilled, tmp_path):
    """After step 4 of 6: the end is near that of the run which was not cut off, nearer than without the optimizer."""
    flags = [*FLAGS, "--k", "4", "--n", "8", "--prompts-per-step", "16", "--save-every", "2", "--lr", "1e-2"]
    assert run(SCRIPTS[0], *flags, "--model", skilled, "--device", DEVICE, "--run-name", "whole").returncode == 0
    whole = tmp_path / "runs/whole"
    assert (
        run(SCRIPTS[0], *flags, "--model", skilled, "--device", DEVICE, "--run-name", "cut", "--steps", "4").returncode
        == 0
    )
    cut = tmp_path / "runs/cut"
    arguments = json.loads((cut / "args.json").read_text()) | {"steps": 6}
    (cut / "args.json").write_text(json.dumps(arguments))
    shutil.rmtree(cut / "policy")
    result = run(SCRIPTS[0], "--resume", "runs/cut")
    assert result.returncode == 0 and "resuming at step 4" in result.stdout, result.stderr
    first, second = steps_of(whole), steps_of(cut)
    assert [r["step"] for r in second] == [1, 2, 3, 4, 5, 6]
    assert [r["reward"] for r in second[4:]] == pytest.approx([r["reward"] for r in first[4:]], abs=0.1)
    start, end, resumed = (flat_weights(x) for x in (Path(skilled), whole / "policy", cut / "policy"))
    assert (resumed - end).norm() < 0.2 * (end - start).norm()
    checkpoint = torch.load(cut / "checkpoint.pt", weights_only=True)["state"]
    assert all(x["step"] == 6 for x in checkpoint["optimizer"]["state"].values())
    assert records(cut)[0] == records(whole)[0]


def test_peak_memory_of_the_update_is_a_fraction_of_the_whole_logits():
    """16 prompts, 4 responses each of 128 tokens, 150 000 words: the logits alone would be 4.6 GiB in float32."""
    vocabulary, B, n, T = 150_000, 16, 4, 128
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=256)  # fmt: skip
    policy = common.Policy(LlamaForCausalLM(config).to(DEVICE).eval(), None, [1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (B, n, T), generator=generator).to(DEVICE)
    rollouts = common.Rollouts([[5, 6, 7]] * B, ids, torch.ones_like(ids).bool(), torch.zeros(ids.shape, device=DEVICE))
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    common.accumulate_gradient(policy, rollouts, torch.randn(B, n, generator=generator))
    peak = torch.cuda.max_memory_allocated() - before
    assert next(policy.model.parameters()).grad.norm() > 0
    assert peak < 0.25 * B * n * T * vocabulary * 4


def test_sampling_at_half_a_billion_parameters(capsys):
    """benchmarks/sample.py on random weights in the shape of Qwen2-0.5B: its figures are printed, not judged."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("sample")
    rows, results = benchmark.compare("Qwen2-0.5B shape", benchmark.qwen_policy(0), 4.0, 64, 8, 64, rounds=3)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: sampled tokens a second, 64 prompts x 8 samples x 64 tokens")
        for row in rows:
            print("  ".join(map(str, row)))
    assert all(rate > 0 for result in results for rate in (*result["ours"], *result["theirs"]))
