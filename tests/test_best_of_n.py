"""bon_rl.py beside `exact` (test_estimators.py): exact gradients, what ties the two papers, the value network."""

import golden
import pytest
import torch
from enumeration import BINARY, GRADED, PROMPTS, THETA, K, all_tuples, exact_gradient, expected_gradient, log_policy
from test_estimators import SCORES
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import bon_rl
import common
import pass_at_k_pg
from bon_rl import advantages

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def sampled(N, estimator, rewards=GRADED, scores=SCORES, **known):
    """What `expected_gradient` reads; known: baseline or p_fail, (PROMPTS,)."""

    def of_prompt(b, y):
        given = {name: values[b].expand(len(y)) for name, values in known.items()}
        return advantages(rewards[b][y], scores[b][y], N, estimator, **given)

    return of_prompt


def failure_rates():
    """(PROMPTS,) P_fail of the BINARY rewards under the policy."""
    return ((1 - BINARY) * log_policy().exp()).sum(-1).detach()


def best_of_n_policy(N, scores=SCORES):
    """(PROMPTS, K): pi_bon by enumeration, equal scores sharing. Differentiable."""
    y = all_tuples(N)  # (K^N, N)
    chance = log_policy()[:, y].sum(-1).exp()  # (PROMPTS, K^N)
    won = (scores[:, y] == scores[:, y].amax(-1, keepdim=True)).double()  # (PROMPTS, K^N, N)
    won = won / won.sum(-1, keepdim=True)
    return torch.einsum("bt,btn,tnk->bk", chance, won, torch.nn.functional.one_hot(y, K).double())


def tilted(N):
    """(PROMPTS, K), with the gradient of the paper's h(y): log pi(y) + lambda_N E_{y'}[1{s(y) >= s(y')} log pi(y')]."""
    log_pi = log_policy()
    beats = (SCORES.unsqueeze(-1) >= SCORES.unsqueeze(-2)).double()  # (PROMPTS, K, K): y, y'
    expectation = beats @ (log_pi.exp().detach() * log_pi).unsqueeze(-1)  # (PROMPTS, K, 1)
    return log_pi + common.best_of_n_tilt(N) * expectation.squeeze(-1)


GIVEN = {"baseline": torch.tensor([0.3, -0.2], dtype=torch.float64)}


@pytest.mark.parametrize("N, n, known", [(2, 6, {}), (2, 8, {}), (1, 3, {}), (2, 4, GIVEN), (3, 6, GIVEN)])
def test_variational_is_the_papers_formula(N, n, known):
    """E_{y ~ pi_bon}[h(y) (R(y) - b)], all its expectations exact."""
    bon = best_of_n_policy(N).detach()
    value = known.get("baseline", (bon * GRADED).sum(-1))  # (PROMPTS,)
    (exact,) = torch.autograd.grad((bon * (GRADED - value.unsqueeze(-1)) * tilted(N)).sum() / PROMPTS, THETA)
    torch.testing.assert_close(expected_gradient(sampled(N, "variational", **known), n), exact, **EXACT)


@pytest.mark.parametrize("N, n", [(1, 2), (2, 2), (3, 3), (4, 4), (2, 4), (3, 5)])
def test_ties_between_the_papers(N, n):
    """With 0/1 rewards that also select, and P_fail known: BoN-RLB, BoN-RLB(P), its all-sample form, leave-one-out and
    Tang's pass@N estimator all have the gradient of pass@N as their expectation."""
    exact = exact_gradient(lambda b, y: max(BINARY[b, a].item() for a in y), N)
    for estimator in ("rlb", "rlb-p", "rlb-all"):
        estimate = expected_gradient(sampled(N, estimator, BINARY, BINARY, p_fail=failure_rates()), n)
        torch.testing.assert_close(estimate, exact, **EXACT, msg=lambda text, name=estimator: f"{name}: {text}")
    rewards = BINARY[0][all_tuples(n)]
    torch.testing.assert_close(advantages(rewards, rewards, N, "exact"), pass_at_k_pg.advantages(rewards, N), **EXACT)


def test_bad_input_is_refused():
    r = torch.tensor([[1.0, 0, 0, 0]])
    refused = {
        r"scores must be finite: see \(prompt, sample\) \[0, 1\]": (r, torch.tensor([[0, torch.nan, 0, 0]]), 2),
        "groups of N=2, 3 or more": (r, r, 2, "variational"),
        "rewards that are 0 or 1": (r / 2, r, 2, "rlb"),
        "scores that order the samples as the rewards do": (r, 1 - r, 2, "rlb-all"),
        "no use for a baseline": (r, r, 2, "exact", torch.zeros(1)),
    }
    for complaint, arguments in refused.items():
        with pytest.raises(ValueError, match=complaint):
            advantages(*arguments)


def test_tilt():
    """The root of its equation, against 40 digits; 0 for one sample, and about N + 1 for many."""
    for N in (2, 4, 8, 16, 32, 64):
        assert common.best_of_n_tilt(N) == pytest.approx(float(golden.tilt(N)), rel=1e-12)
    assert common.best_of_n_tilt(1) == 0 and common.best_of_n_tilt(4096) == pytest.approx(4097, abs=1e-3)
    with pytest.raises(ValueError, match="N must be at least 1"):
        common.best_of_n_tilt(0)


def test_schedules():
    beta = [bon_rl.kl_coefficient(step, 1.0, 0.075, delay=10, anneal_steps=100) for step in (1, 10, 60, 110, 500)]
    assert beta == pytest.approx([1, 1, 0.5375, 0.075, 0.075])
    assert bon_rl.kl_coefficient(500, 0.3, None, delay=10, anneal_steps=100) == 0.3


def test_value_network_learns_the_reward_of_each_prompt(monkeypatch):
    """It reads the prompt's last token, a micro-batch at a time, and averages its gradients over processes."""
    torch.manual_seed(0)
    small = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(intermediate_size=16, **small)
    policy = common.Policy(LlamaForCausalLM(config), None, [1], micro_batch_tokens=5)
    value = bon_rl.ValueNetwork(policy)
    prompts, rewards = [[3, 4, 5], [6, 7], [8]], torch.tensor([1.0, 0.0, 0.5])
    assert value(prompts).tolist() == [0, 0, 0]
    optimizer, averaged = torch.optim.AdamW(value.parameters(), lr=1e-2), []
    monkeypatch.setattr(bon_rl, "average_gradients", lambda parameters: averaged.append([p.grad for p in parameters]))
    values, loss = value.fit(optimizer, policy, prompts, rewards)
    assert values.tolist() == [0, 0, 0] and loss == pytest.approx(1.25 / 3)
    # d/dw of the mean of (h w + b - r)^2 at w = b = 0 is -2/3 sum r h, and -2/3 sum r
    with torch.no_grad():
        states = [policy.model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
    expected = -2 / 3 * (rewards.unsqueeze(-1) * torch.stack(states)).sum(0)
    (gradients,) = averaged
    norm = torch.cat([expected, -2 / 3 * rewards.sum().view(1)]).norm()  # it was clipped to 1, after the averaging
    torch.testing.assert_close(gradients[-2][0], expected / max(norm, 1), rtol=1e-4, atol=1e-6)
    for _ in range(100):
        value.fit(optimizer, policy, prompts, rewards)
    assert value(prompts).tolist() == pytest.approx(rewards.tolist(), abs=0.05)
    torch.testing.assert_close(value(prompts)[1:2], value([prompts[1]]))  # filler is not read


def test_the_value_network_reads_what_the_output_layer_reads():
    """OPT-350m's last states are half as wide as its layers."""
    config = OPTConfig(vocab_size=16, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1,
                       num_attention_heads=2, do_layer_norm_before=False)  # fmt: skip
    value = bon_rl.ValueNetwork(common.Policy(OPTForCausalLM(config), None, [1]))
    assert value([[3, 4, 5], [6, 7]]).tolist() == [0, 0]
