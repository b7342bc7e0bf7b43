"""Sampling and the training step, on random weights of two architectures, with ragged prompts."""

import contextlib
import copy
import dataclasses
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import measure
import pytest
import torch
from enumeration import GRADED, THETA, expected_gradient, log_policy
from model_zoo import tiny_model

import common
import harness.policy
from verifiers import BadInput

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7]]  # ragged, and two equal ones that must not merge


def random_policy(architecture: str, vocabulary: int = 24) -> common.Policy:
    """Random weights, far from uniform, with four tokens that end a response, so that lengths differ. Gemma 2 squeezes
    its logits into an interval, here of 1 about 0."""
    cap = {"final_logit_softcapping": 0.5} if architecture == "gemma2" else {}
    model = tiny_model(architecture, vocab_size=vocabulary, **cap)
    harness.policy.turn_off_dropout(model)
    return common.Policy(model, SimpleNamespace(eos_token_id=1), [1, 2, 3, 4])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request):
    return random_policy(request.param)


def rollouts_of(policy, n=5, temperature=1.0, length=12, seed=0):
    return common.sample(policy, PROMPTS, n, length, temperature, torch.Generator().manual_seed(seed))


def naive_log_probs(policy, rollouts, temperature):
    """One unpadded forward pass a response, whole logits."""
    result = torch.zeros_like(rollouts.log_probs)
    for b, prompt in enumerate(rollouts.prompts):
        for i in range(rollouts.ids.shape[1]):
            response = rollouts.ids[b, i][rollouts.mask[b, i]]
            ids = torch.cat([torch.tensor(prompt), response])
            log_p = (policy.model(ids[None]).logits[0] / temperature).log_softmax(-1)
            for t, token in enumerate(response):
                result[b, i, t] = log_p[len(prompt) + t - 1, token]
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_sampled_log_probs_equal_those_of_training_and_of_the_plain_model(architecture, temperature):
    policy = random_policy(architecture)
    rollouts = rollouts_of(policy, temperature=temperature)
    trained = common.response_log_probs(policy, *rollouts.flat()[:3], temperature).view_as(rollouts.log_probs)
    torch.testing.assert_close(trained, rollouts.log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(naive_log_probs(policy, rollouts, temperature), rollouts.log_probs, rtol=0, atol=1e-4)
    of_tokens = rollouts.log_probs[rollouts.mask]
    assert of_tokens.max() - of_tokens.min() > 0.5


def test_bfloat16_autocast_samples_and_trains_nearly_alike(policy, monkeypatch):
    """What CUDA runs, on the CPU: log-probs and gradients are float32 and near those without autocast. Keys are kept in
    bfloat16: in float32, as rotary embeddings leave them, they would take twice the memory."""
    A, kept = torch.randn(len(PROMPTS), 5, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(common, "autocast", lambda device: torch.autocast("cpu", dtype=torch.bfloat16))
    update = common.CompactCache.update
    noted = lambda *args, **options: kept.append(update(*args, **options)) or kept[-1]  # noqa: E731
    monkeypatch.setattr(common.CompactCache, "update", noted)
    rollouts = rollouts_of(policy)
    assert {x.dtype for pair in kept for x in pair} == {torch.bfloat16}
    half = gradient(policy, lambda: gradient_of(policy, rollouts, A, 64, 0.2))
    monkeypatch.undo()
    whole = gradient(policy, lambda: gradient_of(policy, rollouts, A, 64, 0.2))
    assert rollouts.log_probs.dtype == half.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(naive_log_probs(policy, rollouts, 1.0), rollouts.log_probs, rtol=0, atol=0.05)
    assert (half - whole).norm() < 0.03 * whole.norm()


def test_responses_end_at_a_stop_token_and_filler_is_masked(policy):
    rollouts, stop = rollouts_of(policy, n=16), torch.tensor(policy.stop_ids)
    length = rollouts.mask.sum(-1)
    assert (length >= 1).all() and length.min() < length.max() == rollouts.ids.shape[2]
    for ids, mask in zip(rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1)):
        end, ends = int(mask.sum()), torch.isin(ids[mask], stop)
        assert mask[:end].all() and not ends[:-1].any() and (end == 12 or ends[-1])
    assert (rollouts.log_probs[~rollouts.mask] == 0).all()


def test_samples_follow_the_models_distribution():
    """Frequencies of first and second tokens against the model's probabilities, by a chi-square with a fixed seed."""
    policy, n = random_policy("llama", vocabulary=8), 4000
    rollouts = common.sample(policy, [[5, 6], [3]], n, 2, 0.7, torch.Generator().manual_seed(1))
    for b, prompt in enumerate([[5, 6], [3]]):
        p = (policy.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
        count = torch.bincount(rollouts.ids[b, :, 0], minlength=8)
        assert ((count - n * p) ** 2 / (n * p)).sum() < 24.3  # 0.1% quantile of chi-square with 7 degrees of freedom
        after = int(count.masked_fill(torch.arange(8) < 5, 0).argmax())  # most frequent token that does not stop
        p = (policy.model(torch.tensor([[*prompt, after]])).logits[0, -1] / 0.7).softmax(-1)
        second = torch.bincount(rollouts.ids[b][rollouts.ids[b, :, 0] == after][:, 1], minlength=8)
        assert ((second - second.sum() * p) ** 2 / (second.sum() * p)).sum() < 24.3


def test_a_number_picks_the_token_in_whose_share_it_falls(monkeypatch):
    """A token of probability 0 has none, not even the number 0. Scores that are not numbers give any token."""
    policy, uniform = random_policy("llama", 6), torch.tensor([[0.0], [0.19], [0.21], [0.49], [0.51], [0.9999]])
    p = torch.tensor([0, 0.2, 0.3, 0, 0.5, 0])
    monkeypatch.setattr(common, "logits", lambda model, hidden: p.log().expand(len(hidden), 6))
    ids, mask, log_probs = common.sampled_rows(policy, [[4, 5], [3]] * 3, uniform, 1.0)
    assert ids[:, 0].tolist() == [1, 1, 2, 2, 4, 4] and mask.all()
    torch.testing.assert_close(log_probs[:, 0], torch.tensor([0.2, 0.2, 0.3, 0.3, 0.5, 0.5]).log())
    p = p + torch.nan
    ids, _, log_probs = common.sampled_rows(policy, [[4, 5], [3]] * 3, uniform, 1.0)
    assert ids.max() < 6 and log_probs.isnan().all()


def test_every_prompt_is_read_once(policy, noted):
    """The first forward pass has one row a different prompt; later ones have one token a row, and fewer as they end."""
    shapes = noted(policy.model.base_model, "forward", lambda input_ids, **_: input_ids.shape)
    rollouts_of(policy, n=16)
    rows, tokens = zip(*shapes[1:])
    assert shapes[0] == (3, 7) and {*tokens} == {1}
    assert rows[0] <= 16 * len(PROMPTS) and [*rows] == sorted(rows, reverse=True) and rows[-1] < rows[0]


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]] * 4, [[9, 10]]], ids=["ragged", "equal", "one"])
def test_tokens_do_not_depend_on_how_many_rows_are_sampled_at_once(policy, prompts):
    """A random number belongs to a row and a position, not to the batch that the row is in."""

    def of(sample_rows):
        few = dataclasses.replace(policy, sample_rows=sample_rows)
        return common.sample(few, prompts, 5, 12, 0.9, torch.Generator().manual_seed(5))

    whole = of(1000)
    assert len({tuple(row) for row in whole.ids.flatten(0, 1).tolist()}) > 3
    for sample_rows in (1, 3):
        part = of(sample_rows)
        assert torch.equal(part.ids, whole.ids) and torch.equal(part.mask, whole.mask)
        torch.testing.assert_close(part.log_probs, whole.log_probs, rtol=0, atol=1e-5)


MEMORY = "CUDA error: out of memory", "not enough memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), *map(RuntimeError, MEMORY)])
def test_out_of_memory_halves_the_rows_and_keeps_the_tokens(policy, monkeypatch, error):
    whole, sampled_rows, limit = rollouts_of(policy), common.sampled_rows, 6

    def with_little_memory(policy, rows, *args):
        if len(rows) > limit:
            raise error
        return sampled_rows(policy, rows, *args)

    monkeypatch.setattr(common, "sampled_rows", with_little_memory)
    little = dataclasses.replace(policy)
    assert torch.equal(rollouts_of(little).ids, whole.ids) and little.sample_rows == 5
    limit = 0
    with pytest.raises(BadInput, match="out of memory with one response at a time"):
        rollouts_of(little)
    assert little.sample_rows == 1
    error = RuntimeError("size mismatch")  # is not about memory, and not tried again
    with pytest.raises(RuntimeError, match="size mismatch"):
        rollouts_of(whole_again := dataclasses.replace(policy))
    assert whole_again.sample_rows == policy.sample_rows


def gradient(policy, backward) -> torch.Tensor:
    policy.model.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def gradient_of(policy, rollouts, advantages, budget, clip=None) -> float:
    """The loss of accumulate_gradient with this budget of tokens."""
    policy.micro_batch_tokens = budget
    return common.accumulate_gradient(policy, rollouts, advantages, clip)


def naive_gradient(policy, rollouts, advantages, temperature):
    """-(1/B) sum_b sum_i A_bi log pi(y_bi), one response at a time."""
    log_p = lambda: naive_log_probs(policy, rollouts, temperature).sum(-1)  # noqa: E731
    return gradient(policy, lambda: (-(log_p() * advantages).sum() / len(rollouts.prompts)).backward())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gradient_equals_the_naive_one_for_any_budget_and_composition(sparse, policy, noted, monkeypatch):
    """Also with the output layer read three tokens at a time. Each different row that has an advantage is computed
    once; here three of a prompt's five are equal."""
    rollouts = rollouts_of(policy, temperature=0.8)
    for x in (rollouts.ids, rollouts.mask):
        x[:, 3:] = x[:, :1]
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(rollouts.ids.shape[:2], generator=generator)
    advantages *= torch.rand(advantages.shape, generator=generator) < (0.2 if sparse else 1)
    expected = naive_gradient(policy, rollouts, advantages, 0.8)
    prompts, ids, mask, _ = rollouts.flat()
    different = {(*prompts[i], -1, *ids[i][mask[i]].tolist()) for i in advantages.flatten().nonzero()[:, 0].tolist()}
    sizes = noted(common.F, "cross_entropy", lambda x, *_, **__: len(x))
    rows = noted(common, "response_states", lambda model, prompts, *_: len(prompts))
    for budget, tokens in ((1, None), (40, None), (100, 3), (10**6, None)):
        sizes.clear(), rows.clear()
        monkeypatch.setattr(common, "LOGITS_PER_CHUNK", 24 * (tokens or 10**6))
        actual = gradient(policy, lambda: gradient_of(policy, rollouts, advantages, budget))
        assert (actual - expected).norm() <= 1e-6 * expected.norm(), budget
        assert max(sizes) == tokens or tokens is None
        assert sum(rows) == len(different) < len(prompts)
    assert gradient_of(policy, rollouts, torch.zeros_like(advantages), 100) == 0


@pytest.mark.slow
def test_samples_and_gradients_are_the_same_to_the_bit_beside_a_load():
    """A resumed run is bit-identical only if no sum is taken in the order in which interrupted threads finish."""
    policy, prompts = measure.tiny_policy("cpu", hidden=128), [[5 + i, 7, 9 + i, 11] for i in range(16)]
    A, outcomes = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), []
    with contextlib.ExitStack() as end:
        end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)
        for _ in range(3):
            end.callback(end.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"])).kill)
        for _ in range(4):
            rollouts = common.sample(policy, prompts, 16, 8, 1.0, torch.Generator().manual_seed(1))
            g = gradient(policy, lambda: common.accumulate_gradient(policy, rollouts, A))
            outcomes.append(torch.cat([rollouts.log_probs.flatten(), g]))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_gradient_checkpointing_recomputes_layers_in_training_alone(policy):
    """The same gradient, each layer's MLP computed twice; sampling with the cache, once a token; dropout off."""
    rollouts = rollouts_of(policy)
    advantages = torch.randn(rollouts.ids.shape[:2], generator=torch.Generator().manual_seed(2))
    expected, calls = naive_gradient(policy, rollouts, advantages, 1.0), []
    mlp = next(module for name, module in policy.model.named_modules() if name.endswith(".mlp"))
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradient(policy, lambda: gradient_of(policy, rollouts, advantages, 10**6))
    assert len(calls) == 2 and (actual - expected).norm() <= 1e-6 * expected.norm()
    assert not any(m.training for m in policy.model.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(rollouts_of(policy).log_probs, rollouts.log_probs)
    policy.model.gradient_checkpointing_disable()
    hook.remove()


def test_micro_batches_by_value():
    """Longest first; a batch counts its rows times its longest prompt and its longest response. Equal rows are one, but
    not those of another prompt or the beginning of a longer one."""
    prompts, lengths = [[3] * 6, [4] * 2], [[2, 1, 2], [1, 5, 3]]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(-1)  # (2, 3, 5)
    rollouts = common.Rollouts(prompts, torch.arange(30).view(2, 3, 5), mask, torch.zeros(2, 3, 5))
    rollouts.ids[0, 2] = rollouts.ids[0, 0]
    rollouts.ids[0, 1, 0] = rollouts.ids[1, 0, 0] = 0
    # prompt + response: rows 0 and 2, equal, 6 + 2; row 1, 6 + 1; row 4, 2 + 5; row 5, 2 + 3; row 3, 2 + 1
    expected = {22: [[0, 2, 1], [4, 5, 3]], 20: [[0, 2, 1], [4, 5], [3]], 1: [[0, 2], [1], [4], [5], [3]]}
    batches = {budget: [*common.micro_batches(rollouts, torch.arange(6), budget)] for budget in expected}
    assert {budget: [rows.tolist() for rows, *_ in found] for budget, found in batches.items()} == expected
    _, of_row, prompts, ids, mask = batches[22][0]
    assert of_row.tolist() == [0, 0, 1] and prompts == [[3] * 6] * 2
    assert ids.tolist() == [[0, 1], [0, 6]] and mask.tolist() == [[True, True], [True, False]]
    assert [rows.tolist() for rows, *_ in common.micro_batches(rollouts, torch.tensor([3, 2]), 99)] == [[2, 3]]


def test_kl_advantages_are_the_gradient_of_minus_kl():
    """E[sum_i A_i grad log pi(y_i)] = -grad KL(pi || pi_ref), by enumeration of all pairs of responses of one token."""
    ratios = log_policy() - GRADED.log_softmax(-1)  # (PROMPTS, K): to a policy that is far away
    (exact,) = torch.autograd.grad(-(log_policy().exp() * ratios).sum(-1).mean(), THETA, retain_graph=True)
    estimate = expected_gradient(lambda b, y: common.kl_advantages(ratios[b][y].detach().unsqueeze(-1)), 2)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-12)


def test_kl_estimate_and_log_ratios(policy):
    """Exactly 0 against a copy; against other weights near the plain mean of many samples, and never negative."""
    policy.micro_batch_tokens = 200
    rollouts = rollouts_of(policy, n=25, length=4, temperature=0.7)
    assert (common.log_ratios(policy, copy.deepcopy(policy), rollouts) == 0).all()
    other = copy.deepcopy(policy)
    for parameter in other.model.parameters():
        parameter.data.mul_(1.05)
    ratios = common.log_ratios(policy, other, rollouts)
    assert ratios.shape == rollouts.ids.shape and (ratios[~rollouts.mask] == 0).all()
    expected = rollouts.log_probs - naive_log_probs(other, rollouts, 0.7)
    torch.testing.assert_close(ratios, expected.detach() * rollouts.mask, atol=2e-5, rtol=1e-4)
    assert ratios.abs().max() > 0.01
    plain = ratios.sum(-1).flatten()
    error = 4 * plain.std() / math.sqrt(len(plain))
    assert common.kl_estimate(ratios) == pytest.approx(plain.mean().item(), abs=error.item())
    assert common.kl_estimate(ratios) > 0
    tiny = torch.tensor([[[1e-5, -1e-5], [2e-5, 0.0]]])  # e^-x - 1 + x is x^2/2: 1e-10 and 2e-10 a response
    assert common.kl_estimate(tiny) == pytest.approx(1.5e-10, rel=1e-4)  # does not cancel


def test_out_of_memory_in_training_halves_the_micro_batch_down_to_one_row(policy, monkeypatch):
    """The longest row has 7 + 12 tokens. Where 25 fit, 128 become 16; where 10 do, 16 is too little."""
    rollouts, states = rollouts_of(policy), common.response_states
    advantages = torch.randn(rollouts.ids.shape[:2], generator=torch.Generator().manual_seed(2))
    expected = naive_gradient(policy, rollouts, advantages, 1.0)

    def with_little_memory(model, prompts, ids, mask):
        if len(prompts) * (max(map(len, prompts)) + ids.shape[1]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(model, prompts, ids, mask)

    monkeypatch.setattr(common, "response_states", with_little_memory)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    step = lambda: common.policy_gradient_step(little, optimizer, rollouts, advantages, 1e9)  # noqa: E731
    fits, little = 25, dataclasses.replace(policy, micro_batch_tokens=128)
    assert (gradient(policy, step) - expected).norm() <= 1e-6 * expected.norm() and little.micro_batch_tokens == 16
    fits, little = 10, dataclasses.replace(policy, micro_batch_tokens=128)
    with pytest.raises(BadInput, match="out of memory with one response at a time"):
        step()
    assert little.micro_batch_tokens == 16


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux")
def test_memory_that_really_runs_out_on_the_cpu_halves_the_rows():
    """In a process whose address space is limited: 64 rows of 200,000 logits do not fit, some of them do."""
    policy = random_policy("llama", vocabulary=200_000)
    policy.sample_rows, rows = 64, 0
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            import resource

            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, -1))
            rollouts = common.sample(policy, PROMPTS[:1] * 8, 8, 4, generator=torch.Generator().manual_seed(0))
            rows = policy.sample_rows * (rollouts.ids.shape[:2] == (8, 8))
        os._exit(rows)
    assert 1 <= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 64
