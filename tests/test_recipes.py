"""The recipes for TRL, inside its trainers where it is installed (pip install -r benchmarks/requirements.txt): the
optimiser's gradient beside the gradient of common.accumulate_gradient on the same samples. For verl: test_verl.py."""

import importlib.util
import sys
from functools import partial

import pytest
import torch
from named_estimators import ESTIMATORS, B, N, by_recipe, ours, rewards_and_scores
from runs import ROOT, torchrun
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import common
import harness.policy
import majority_pg
from verifiers import votes_from_answers

sys.path.insert(0, str(ROOT / "recipes"))
needs_trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="pip install -r benchmarks/requirements.txt")
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="pip install peft")
TOKENS, TEMPERATURE, TOKENIZER = 7, 0.8, harness.policy.tiny_tokenizer()
PROBLEMS = ["1+2=", "47*85=", "9="]  # of several lengths


def small_llama() -> LlamaForCausalLM:
    """Random weights; an eighth of the tokens end a response: lengths differ."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, eos_token_id=list(range(1, 14)),
                         bos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config)


class Seen(TrainerCallback):
    """What each step of a trainer saw: `samples`, (prompts, token ids), of this process; `weights` and `gradients`, by
    name, of the optimiser's parameters."""

    def __init__(self):
        self.samples, self.weights, self.gradients = [], [], []

    def on_pre_optimizer_step(self, *_, model, **__):
        trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
        self.weights.append({name: x.detach().clone() for name, x in trained.items()})
        self.gradients.append({name: x.grad.clone() for name, x in trained.items()})


def trained(out, reward_funcs, steps=1, processes=1, problems=PROBLEMS, config={}, **more):
    """Train `small_llama` by our trainer of TRL, in micro-batches that split groups; returns it and its `Seen`. The
    first reward function is also told the step, 0 at first."""
    import trl
    import trl_k_sample
    from datasets import Dataset

    first, *others = reward_funcs
    seen = Seen()

    def watched(prompts, completion_ids, **columns):
        seen.samples.append((prompts, completion_ids))
        return first(prompts=prompts, completion_ids=completion_ids, step=len(seen.samples) - 1, **columns)

    settings = dict(
        max_steps=steps, per_device_train_batch_size=3, num_generations=N, learning_rate=0.0,
        gradient_accumulation_steps=len(problems) * N // 3 // processes, max_completion_length=TOKENS, beta=0.0,
        bf16=False, use_cpu=True, max_grad_norm=0.0, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False,
        temperature=TEMPERATURE, loss_type="dr_grpo",
    )  # fmt: skip
    trainer = trl_k_sample.KSampleTrainer(
        model=small_llama(), args=trl.GRPOConfig(str(out), **settings | config), processing_class=TOKENIZER,
        reward_funcs=[watched, *others], train_dataset=Dataset.from_list([{"prompt": x} for x in problems]),
        callbacks=[seen], **more,
    )  # fmt: skip
    trainer.train()
    return trainer, seen


def our_gradient(samples, A, weights, peft=None):
    """By name, of the parameters in `weights`, set before. peft: a model of PEFT in the place of `small_llama`."""
    (prompts, rows), model = samples, peft or small_llama()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    model.zero_grad()
    ids, mask = (x.view(len(A), N, -1) for x in common.padded(rows))  # (B n, T) -> (B, n, T)
    assert 0 < mask.float().mean() < 1  # lengths differ
    rollouts = common.Rollouts(TOKENIZER(prompts[::N]).input_ids, ids, mask, torch.zeros(ids.shape), TEMPERATURE)
    policy = common.Policy(peft.get_base_model() if peft else model, TOKENIZER, [1])
    common.accumulate_gradient(policy, rollouts, A)
    return {name: named[name].grad for name in weights}


def assert_equal_gradients(theirs, ours):
    """To 1e-5 of the longest component."""
    scale = max(x.abs().max().item() for x in ours.values())
    assert scale > 1e-3  # there is something to compare
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * scale)


def answer_of(completion: str) -> str | None:
    """Three answers, or none."""
    return None if not completion else ("a", "b", "c", None)[ord(completion[0]) % 4]


def votes_of(texts) -> torch.Tensor:
    """Of (R,) completions, N a prompt: (R / N, N)."""
    return votes_from_answers([[answer_of(text) for text in texts[i : i + N]] for i in range(0, len(texts), N)])


@pytest.fixture(scope="module")
def a_step_of_each(tmp_path_factory):
    """One training run at learning rate 0, a step for each estimator: Seen, and the votes of each step."""
    import trl_k_sample

    names, votes, steps = list(ESTIMATORS), [], iter(ESTIMATORS)

    def verify(completions, step, **_):
        votes.append(votes_of(completions))
        return rewards_and_scores(names[step], step)[0].flatten().tolist()

    def score(completions, **_):
        step = len(votes) - 1
        return rewards_and_scores(names[step], step)[1].flatten().tolist()

    def advantages_of_the_step(rewards, votes, scores):
        columns, name = {"r": rewards, "v": votes, "s": scores}, next(steps)
        return by_recipe(trl_k_sample, name)(*(columns[x] for x in ESTIMATORS[name][1]))

    functions = [verify, trl_k_sample.vote_of(answer_of), score]
    _, seen = trained(tmp_path_factory.mktemp("trl"), functions, len(names), advantages=advantages_of_the_step)
    return seen, votes


@needs_trl
@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_in_trl_has_our_gradient(name, a_step_of_each):
    (seen, votes), step = a_step_of_each, list(ESTIMATORS).index(name)
    rewards, scores = rewards_and_scores(name, step)
    assert (votes[step] < 0).any()
    A = ours(name, r=rewards, v=votes[step], s=scores)
    assert_equal_gradients(seen.gradients[step], our_gradient(seen.samples[step], A, seen.weights[step]))


@needs_trl
@pytest.mark.parametrize("wrong, message", [
    ({"loss_type": "dapo"}, "loss_type must be 'dr_grpo', not 'dapo'"),
    ({"importance_sampling_level": "sequence", "top_k": 20}, "importance_sampling_level must be 'token', .*top_k"),
    ({"steps_per_generation": 12}, "gradient_accumulation_steps must be a multiple of steps_per_generation"),
])  # fmt: skip
def test_settings_with_another_gradient_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, [lambda **_: [0.0] * B * N], config=wrong, advantages=None)


def worth(completions) -> list[float]:
    """A reward that texts of random policies earn in part."""
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


@pytest.mark.slow
@needs_trl
@needs_peft
def test_lora_on_a_small_llama(tmp_path):
    """Two steps of LoRA by maj@3; each with our gradient of the adapters, and nothing else is trained."""
    from peft import LoraConfig
    from trl_k_sample import majority, vote_of

    texts = []

    def verify(completions, **_):
        texts.append(completions)
        return worth(completions)

    trainer, seen = trained(
        tmp_path, [verify, vote_of(answer_of)], steps=2, problems=PROBLEMS[:2], config={"learning_rate": 1e-2},
        advantages=partial(majority, k=3, estimator="unbiased"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )  # fmt: skip
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert len(seen.gradients) == 2 and all("lora" in name for name in seen.weights[0])
    assert any(not torch.equal(x, seen.weights[1][name]) for name, x in seen.weights[0].items())
    for step in range(2):
        rewards = torch.tensor(worth(texts[step])).view(-1, N)  # (2 N,) -> (2, N)
        A = majority_pg.advantages(votes_of(texts[step]), rewards, 3, "unbiased")
        assert_equal_gradients(seen.gradients[step], our_gradient(seen.samples[step], A, seen.weights[step], model))


PROCESS = """
import sys
sys.path[:0] = [{tests!r}]
import os, torch, conftest
from functools import partial
from test_recipes import answer_of, trained, worth
from trl_k_sample import majority, vote_of
texts = []
def verify(completions, **_):
    texts.extend(completions)
    return worth(completions)
trainer, seen = trained({out!r}, [verify, vote_of(answer_of)], processes=2, config=dict(ddp_backend="gloo"),
                        advantages=partial(majority, k=3, estimator="unbiased"))
assert trainer.accelerator.num_processes == 2
torch.save((texts, seen.samples[0], seen.weights[0], seen.gradients[0]), {out!r} + os.environ["RANK"])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@needs_trl
def test_two_processes_in_trl_have_the_gradient_of_one(tmp_path):
    """By gloo, each with a half of the second group: votes and rewards meet, and gradients are averaged. `biased` with
    k = 3 is made of votes of two, whose ties are worth the same whatever votes are called: it would be blind."""
    (tmp_path / "process.py").write_text(PROCESS.format(tests=str(ROOT / "tests"), out=str(tmp_path / "out")))
    result = torchrun(tmp_path / "process.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shares = [torch.load(tmp_path / f"out{rank}", weights_only=True) for rank in (0, 1)]
    texts, samples = shares[0][0] + shares[1][0], tuple(a + b for a, b in zip(shares[0][1], shares[1][1]))
    assert len(shares[0][0]) == B * N // 2 and B % 2  # a group is in both
    A = majority_pg.advantages(votes_of(texts), torch.tensor(worth(texts)).view(B, N), 3, "unbiased")
    one = our_gradient(samples, A, shares[0][2])
    for *_, gradients in shares:
        assert_equal_gradients({name.removeprefix("module."): x for name, x in gradients.items()}, one)
