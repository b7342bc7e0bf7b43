"""The learned verifier: scores, training, quality, and the scripts that select by it."""

import math
import shutil
from functools import partial

import pytest
import runs
import torch
from model_zoo import save_tiny
from transformers import AutoTokenizer, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from harness.policy import save_policy, tiny_tokenizer
from verifiers import BadInput, Problem, Task, Verdict, arithmetic, learned, load_task

LEARNED = [*(f.replace("--k", "--N") for f in runs.SMALL), "--verifier", "learned"]


def task_of(problems, verify=None) -> Task:
    return Task("toy", problems, problems, verify, template="{prompt}=")


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """A verifier that learnt whether a digit is odd, and the digits."""
    digits = [str(i) for i in range(10)]
    problems = [Problem(str(i), "") for i in range(40)]
    rewards = torch.tensor([[float(int(d) % 2) for d in digits]] * 40)
    base = runs.save_untrained(tmp_path_factory.mktemp("base"))
    options = dict(lr=1e-2, batch=40, epochs=6)
    return learned.trained_verifier(base, task_of(problems), problems, [digits] * 40, rewards, **options), digits


def test_a_trained_verifier_tells_right_from_wrong(parity):
    verifier, digits = parity
    scores = verifier.score(["77", "78"], [digits, digits])
    rewards = torch.tensor([[float(int(d) % 2) for d in digits]] * 2)
    assert scores.shape == (2, 10) and scores.dtype == torch.float32
    assert learned.auc(scores.flatten(), rewards.flatten()) > 0.95


def test_what_a_verifier_reads(parity):
    """A prompt and a response by the task's template, an end token, filler on the right; what exceeds the context of 64
    is cut off at the front."""
    verifier, _ = parity
    tokens = verifier.tokens(["7", "8" * 70], ["12", "345"])
    read = [verifier.tokenizer.decode(ids[keep > 0]) for ids, keep in zip(tokens.input_ids, tokens.attention_mask)]
    assert read == ["7=12<eos>", "8" * 59 + "=345<eos>"]
    assert tokens.attention_mask[0].tolist() == [1] * 5 + [0] * 59


@pytest.mark.parametrize("chat, read", [(True, "u7a3"), (False, "7=3<eos>")])
def test_a_verifier_trained_here_reads_as_the_policy_does(chat, read, untrained, tmp_path):
    """By the chat template of the base, or by the task's words under --no-chat; also when it is loaded again."""
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(shutil.copytree(untrained, tmp_path / "base", dirs_exist_ok=True))
    problems, samples = [Problem("7", "")], ([["3", "4"]], torch.tensor([[1.0, 0.0]]))
    base = str(tmp_path / "base")
    verifier = learned.trained_verifier(base, task_of(problems), problems, *samples, epochs=1, chat=chat)
    save_policy(verifier, tmp_path / "verifier")
    for x in (verifier, learned.load_verifier(str(tmp_path / "verifier"), task_of(problems))):
        assert x.tokenizer.decode(x.tokens(["7"], ["3"]).input_ids[0]) == read


@pytest.mark.parametrize("template, complaint", [
    ("{{ raise_exception('no') }}", r"cannot be rendered \(TemplateError: no\)"),
    ("{{ messages[0].content }}", "does not write the response"),
    ("prompt: {{ messages[1].content }}", "does not write the prompt"),
])  # fmt: skip
def test_a_chat_template_that_cannot_tell_responses_apart_is_refused(template, complaint, untrained, tmp_path):
    folder = str(shutil.copytree(untrained, tmp_path / "base"))
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match=complaint):
        learned.load_verifier(folder, task_of([]), new_head=True)
    learned.load_verifier(folder, task_of([]), new_head=True, chat=False)


def test_a_verifier_that_does_not_know_all_tokens_is_refused(tmp_path):
    with pytest.raises(BadInput, match="the tokenizer has 99 tokens, the model knows 90 of them"):
        learned.load_verifier(save_tiny("llama", tmp_path, vocab_size=90), task_of([]), new_head=True)


def test_scores_are_deterministic_and_do_not_depend_on_the_batch(parity):
    verifier, digits = parity
    scores = verifier.score(["7", "8888"], [digits, digits])
    assert torch.equal(scores, verifier.score(["7", "8888"], [digits, digits]))
    torch.testing.assert_close(verifier.score(["7"], [digits[:3]])[0], scores[0, :3], rtol=1e-4, atol=1e-5)
    twice = verifier.score(["7"], [["3", "12", "3"]])
    assert twice[0, 0] == twice[0, 2] != twice[0, 1]  # equal responses tie to the bit
    assert verifier.score(["7"], [["", "\0\u202e", "9" * 10_000, "é" * 50]]).isfinite().all()


def test_the_budget_changes_the_passes_and_not_the_verifier(untrained, noted):
    """8 rows of 4 tokens, padded ("7=12<eos>" is 5): 15 tokens are three rows at a time, and one if a row is longer."""
    rewards, responses = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2), [["1", "12", "2", "3"]] * 2
    problems = [Problem("7", ""), Problem("8", "")]
    seen = noted(LlamaForSequenceClassification, "forward", lambda *_, input_ids, **__: len(input_ids))
    train, scores = partial(learned.trained_verifier, untrained, task_of(problems), lr=1e-2, epochs=1), []
    for budget, rows in ((16384, [8]), (15, [3, 3, 2]), (4, [1] * 8)):
        seen.clear()
        verifier = train(problems, responses, rewards, budget=budget)
        assert seen == rows
        scores.append(verifier.score(["7"], responses[:1]))
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=1e-4, atol=1e-5)


def test_a_verifier_with_more_positions_than_tokens(tmp_path):
    """RoBERTa's positions begin at 2: 66 of them take 64 tokens."""
    tokenizer = tiny_tokenizer()
    config = RobertaConfig(num_labels=1, pad_token_id=0, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, vocab_size=len(tokenizer), max_position_embeddings=66)  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path)
    verifier = learned.load_verifier(str(tmp_path), task_of([]), new_head=True)
    assert verifier.tokens(["7"], ["1" * 100]).input_ids.shape == (1, 64)
    assert verifier.score(["7"], [["1" * 100]]).isfinite().all()


def test_a_composite_verifier_without_a_filler_token_does_not_read_filler(tmp_path):
    folder, tokenizer = save_tiny("gemma3", tmp_path), tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    verifier = learned.load_verifier(folder, task_of([]), new_head=True)
    both = verifier.score(["7"], [["4", "444444"]])
    torch.testing.assert_close(both[:, :1], verifier.score(["7"], [["4"]]), rtol=1e-4, atol=1e-5)


def test_with_scores_fills_the_verdicts(parity):
    verifier, digits = parity
    rewards = torch.zeros(1, 10)
    task = learned.with_scores(task_of([], lambda *_: Verdict(rewards, rewards.long(), {"timeouts": 1})), verifier)
    verdict = task.verify([Problem("7", "")], [digits])
    assert torch.equal(verdict.scores, verifier.score(["7"], [digits])) and verdict.counts == {"timeouts": 1}
    assert Verdict(rewards, rewards.long()).scores is rewards


def test_training_needs_problems_with_both_outcomes():
    refused = {"right and wrong samples": torch.ones(1, 2), "from 0 to 1": torch.tensor([[0.0, 2.0]])}
    for complaint, rewards in refused.items():
        with pytest.raises(ValueError, match=complaint):
            learned.trained_verifier("unused", task_of([]), [Problem("1", "")], [["1", "2"]], rewards)


def test_auc_counts_ties_one_half_and_quality_counts_within_problems():
    assert learned.auc(torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 0, 1])) == 0.25
    assert math.isnan(learned.auc(torch.ones(2), torch.ones(2)))
    scores = torch.tensor([[3.0, 2.0, -9.0], [-3.0, -2.0, -1.0], [5.0, 5.0, 5.0]])
    rewards = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 1]])
    found = "verifier on 9 held-out samples: AUC 0.889, within problems 1.000 (the 2 with right and wrong samples)"
    assert learned.quality(scores, rewards) == found


@pytest.mark.parametrize("script, flags", [("bon_rl.py", "--estimator variational --n 6"), ("bon_sft.py", "")])
def test_a_run_with_a_learned_verifier(run, untrained, tmp_path, monkeypatch, script, flags):
    def seen(base, task, problems, responses, *_):
        learnt_from.extend((problem.prompt, len(row)) for problem, row in zip(problems, responses))

    learnt_from = []
    monkeypatch.setattr(learned, "trained_verifier", runs.at_call(1, seen, learned.trained_verifier))
    monkeypatch.setattr(arithmetic, "verify", runs.parity)
    out = run(script, *LEARNED, *flags.split(), "--model", untrained, "--verifier-problems", "8", code=0).stdout
    assert "within problems" in out and "bon@2" in out
    assert [size for _, size in learnt_from] == [8] * 8  # samples to each of --verifier-problems, none of them held out
    assert not {prompt for prompt, _ in learnt_from} & {problem.prompt for problem in load_task("arithmetic").test}
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"bon@1", "bon@2", "bon@4", "pass@4"} <= runs.records(folder)[0]["eval"]["all"].keys()
    weights = (folder / "verifier" / "model.safetensors").read_bytes()
    again = run(script, "--resume", f"runs/{folder.name}", code=0)  # reads its own verifier, trains none
    assert "training the verifier" not in again.stderr
    assert weights == (folder / "verifier" / "model.safetensors").read_bytes()
