"""The recipes for other engines, beside our advantages: their functions alone, and inside the engine where it is
installed (pip install -r benchmarks/requirements.txt)."""

import sys
from pathlib import Path

import pytest
import torch

import common
import harness.policy
from pass_at_k_pg import advantages

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from trl_pass_at_k import pass_at_k_reward
from verl_pass_at_k import register_adv_est, register_pass_at_k

B, N = 3, 6


def rewards_of(n=N, seed=0):
    """(B, n) with ties: the first group has one best, the last is equal throughout."""
    rewards = torch.randint(4, (B, n), generator=torch.Generator().manual_seed(seed)).double() / 4
    rewards[0, 2], rewards[-1] = 1.5, 0.5
    return rewards


def centred(values):
    """What GRPOTrainer does to a reward function's (B, n) values with scale_rewards="none"."""
    return values - values.mean(-1, keepdim=True)


@pytest.mark.parametrize("k", range(2, N + 1))
def test_what_centring_does_to_each_estimator(k):
    rewards = rewards_of()
    for estimator in ("mean", "biased"):
        A = advantages(rewards, k, estimator)
        torch.testing.assert_close(centred(A), A)
    A = advantages(rewards, k, "unbiased")
    gain = common.pass_at_k(rewards, k) - common.pass_at_k(rewards, k - 1)
    torch.testing.assert_close(A.sum(-1), k * gain)
    assert gain[0] > 0.01  # so it does not sum to zero
    above = advantages(rewards, k + 1, "biased") if k < N else 0
    torch.testing.assert_close(centred(A), (1 - k / N) * above + k / N * advantages(rewards, k, "biased"))


@pytest.mark.parametrize("k", range(1, N))
def test_trl_reward_function_survives_centring_and_the_leave_one_out_baseline(k):
    rewards, metrics = rewards_of(), {}
    prompts = [f"prompt {b}" for b in range(B) for _ in range(N)]
    function = pass_at_k_reward(lambda prompts, completions, answer: completions, N, k, scale=10.0)
    values = function(
        prompts,
        rewards.flatten().tolist(),
        answer=prompts,
        log_metric=lambda name, value: metrics.update({name: value}),
    )
    values, ours = torch.tensor(values, dtype=torch.float64).view(B, N), advantages(rewards, k + 1, "biased")
    torch.testing.assert_close(centred(values) / 10, ours)
    others = (values.sum(-1, keepdim=True) - values) / (N - 1)  # RLOOTrainer's baseline
    torch.testing.assert_close((values - others) / 10, N / (N - 1) * ours)
    assert metrics == {"true_reward": pytest.approx(rewards.mean().item())}


def test_trl_reward_function_refuses_split_groups():
    function = pass_at_k_reward(lambda prompts, completions: [0.0] * len(prompts), 2, 1, 1.0)
    for prompts in (["a", "a", "b"], ["a", "b", "b", "a"]):
        with pytest.raises(ValueError, match="groups of 2 are split"):
            function(prompts, prompts)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_step_has_our_gradient(name, tmp_path):
    """One step of the unmodified trainer, in two micro-batches that split groups; the gradient it hands the optimiser
    against ours on the same samples."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install -r benchmarks/requirements.txt")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    tokenizer, k, tokens = harness.policy.tiny_tokenizer(), 2, 7
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():  # about an eighth of the tokens end a response
        model.lm_head.weight[1] = 0
        model.lm_head.weight.mul_(3)
        model.lm_head.weight[1] += model.lm_head.weight.abs().mean()
    rewards, seen = rewards_of().float(), {}
    problems = ["1+2=", "47*85=", "9="]

    def verify(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, ids=completion_ids)
        return rewards.flatten().tolist()

    class Keep(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            seen["before"] = {key: value.clone() for key, value in model.state_dict().items()}

        def on_pre_optimizer_step(self, *_, model, **__):
            seen["gradient"] = [parameter.grad.clone() for parameter in model.parameters()]

    special = {"GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"}, "RLOO": {}}[name]
    config = getattr(trl, f"{name}Config")(
        str(tmp_path), max_steps=1, per_device_train_batch_size=B * N // 2, gradient_accumulation_steps=2,
        num_generations=N, max_completion_length=tokens, beta=0.0, bf16=False, use_cpu=True, max_grad_norm=0.0,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        shuffle_dataset=False, dataloader_pin_memory=False, **special,
    )  # fmt: skip
    scale = {"GRPO": N * tokens, "RLOO": N - 1}[name]
    getattr(trl, f"{name}Trainer")(
        model=model, args=config, processing_class=tokenizer, callbacks=[Keep()],
        reward_funcs=pass_at_k_reward(verify, N, k, scale),
        train_dataset=Dataset.from_list([{"prompt": problem} for problem in problems]),
    ).train()  # fmt: skip

    model.load_state_dict(seen["before"])
    model.zero_grad()
    order = seen["prompts"][::N]
    assert sorted(order) == sorted(problems)
    ids, mask = common.padded(seen["ids"])
    assert 0 < mask.float().mean() < 1  # lengths differ
    rollouts = common.Rollouts(
        tokenizer(order).input_ids, ids.view(B, N, -1), mask.view(B, N, -1), torch.zeros(B, N, ids.shape[1])
    )
    policy = common.Policy(model, tokenizer, [1])
    common.accumulate_gradient(policy, rollouts, advantages(rewards, k + 1, "biased"))
    for ours, theirs in zip(model.parameters(), seen["gradient"], strict=True):
        torch.testing.assert_close(theirs, ours.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "unbiased", "biased"])
def test_verl_estimator_equals_ours(estimator):
    registry = {}
    function = register_pass_at_k(
        3, estimator, register=lambda name: lambda function: registry.setdefault(name, function)
    )
    assert registry == {"pass_at_k": function}
    check_verl(function, estimator)


def check_verl(function, estimator):
    """Rows of three prompts in any order, rewards at the last token of responses of several lengths."""
    rewards, order = rewards_of(), torch.randperm(B * N, generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(B * N) % 4 + 2
    mask = (torch.arange(5) < lengths.unsqueeze(-1)).double()  # (rows, T)
    tokens = torch.zeros_like(mask).scatter(-1, lengths.unsqueeze(-1) - 1, rewards.flatten().unsqueeze(-1))
    index = [f"prompt {row // N}" for row in order.tolist()]
    A, returns = function(token_level_rewards=tokens[order], response_mask=mask[order], index=index, config=None)
    ours = N * advantages(rewards, 3, estimator).flatten().unsqueeze(-1) * mask
    torch.testing.assert_close(A, ours[order])
    torch.testing.assert_close(returns, A)


def test_verl_registry_holds_ours():
    if register_adv_est is None:
        pytest.skip("verl is not installed, and 0.9.1 wants older transformers than requirements.txt names")
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    register_pass_at_k(3, name="pass_at_k_of_a_test")
    check_verl(get_adv_estimator_fn("pass_at_k_of_a_test"), "unbiased")
