"""harness/policy.py beyond the embedded policy: how prompts and responses become tokens."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import common
import harness.policy
from verifiers import Problem, Task

GEMMA = (
    "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TASK = Task("toy", [], [], None, template="Question: {prompt}\nAnswer:", instruction="Be brief.")


def policy_with(template: str | None, stops: list[str]) -> common.Policy:
    """A tokenizer of characters and of a chat's special tokens, and no model to speak of."""
    tokenizer = harness.policy.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = template
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=100), device="cpu")
    return common.Policy(model, tokenizer, sorted(tokenizer.convert_tokens_to_ids(stops)))


@pytest.mark.parametrize(
    "template, stops, end",
    [
        (GEMMA, ["<eos>", "<end_of_turn>"], "<end_of_turn>"),  # Gemma: its turns do not end with the tokenizer's <eos>
        (GEMMA.replace("<end_of_turn>", "<eos>"), ["<eos>", "<end_of_turn>"], "<eos>"),
        (GEMMA, ["<eos>"], "<eos>"),  # a model that never stops at the end of a turn
        (None, ["<eos>", "<end_of_turn>"], "<eos>"),
    ],
)
def test_an_experts_response_ends_as_the_policys_own_would(template, stops, end):
    policy = policy_with(template, stops)
    problems = [Problem("1+1?", "2", "2"), Problem("6+6?", "12", "12")]
    prompts = harness.policy.encode_prompts(policy, TASK, problems, 8)
    experts = harness.policy.expert_rollouts(policy, TASK, prompts, [[problem] for problem in problems])
    texts = [policy.tokenizer.decode(ids[mask]) for ids, mask in zip(experts.ids[:, 0], experts.mask[:, 0])]
    space = "" if template else " "
    assert texts == [f"{space}2{end}", f"{space}12{end}"]
    assert common.decode(policy, experts) == [[f"{space}2"], [f"{space}12"]]


def test_a_prompt_is_read_through_the_chat_template_where_there_is_one():
    for template, text in (
        (GEMMA, "<start_of_turn>user\n1+1?\n\nBe brief.<end_of_turn>\n<start_of_turn>model\n"),
        (None, "Question: 1+1?\nAnswer:"),
    ):
        policy = policy_with(template, ["<eos>"])
        (ids,) = harness.policy.encode_prompts(policy, TASK, [Problem("1+1?", "2")], 8)
        assert policy.tokenizer.decode(ids) == text
