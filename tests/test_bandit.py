"""The closed forms of bandit.py, by enumeration, and its gradient, by autograd."""

import itertools

import pytest
import torch

import bandit


def test_exact_metrics_by_enumeration():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=generator).sort(-1).values
    rewards[2, 1] = rewards[2, 2]  # a tie
    log_pi = torch.randn(3, 5, dtype=torch.float64, generator=generator).log_softmax(-1)
    mean, best, kl = bandit.exact_metrics(log_pi, rewards, 3)
    pi = log_pi.exp()
    for s in range(3):
        assert mean[s].item() == pytest.approx((pi[s] * rewards[s]).sum().item())
        enumerated = sum(
            pi[s][list(y)].prod() * rewards[s][list(y)].max() for y in itertools.product(range(5), repeat=3)
        )
        assert best[s].item() == pytest.approx(enumerated.item())
        uniform = torch.full((5,), 0.2, dtype=torch.float64)
        assert kl[s].item() == pytest.approx((pi[s] * (pi[s] / uniform).log()).sum().item())


@pytest.mark.parametrize(
    "estimator, size, scale", [("mean", 1, 1), ("mean x k", 1, 3), ("unbiased", 3, 1), ("biased", 2, 1)]
)
def test_expected_advantages_are_the_gradient_of_the_stated_objective(estimator, size, scale):
    """k = 3: mean of one, 3 times that, max of three, max of two."""
    rewards = torch.tensor([-1.0, 0.2, 0.2, 1.5], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    log_pi = theta.log_softmax(-1)
    y = torch.cartesian_prod(*[torch.arange(4)] * 3)
    A = bandit.advantages(rewards[y], estimator)
    (actual,) = torch.autograd.grad(
        (log_pi[y].sum(-1).exp().detach() * (A * log_pi[y]).sum(-1)).sum(), theta, retain_graph=True
    )
    _, best, _ = bandit.exact_metrics(log_pi[None], rewards[None], size)
    (expected,) = torch.autograd.grad(scale * best.sum(), theta)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_mean_at_kl_follows_the_averages_over_groups_of_seeds(monkeypatch):
    """Average KL 0, 1, 3 and average reward 0, 2, 3, whatever the single seeds do."""
    reward = torch.tensor([[0.0, 0.0], [1.0, 3.0], [4.0, 2.0]])
    kl = torch.tensor([[0.0, 0.0], [0.5, 1.5], [2.0, 4.0]])
    metrics = torch.stack([reward, torch.zeros(3, 2), kl], 1).double()  # (steps + 1, 3, S)
    grid = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    monkeypatch.setattr(bandit, "GROUPS", 1)
    at = bandit.mean_at_kl(metrics, grid)
    assert at[:4, 0].tolist() == pytest.approx([0, 1, 2, 2.5]) and at[4].isnan().all()
    monkeypatch.setattr(bandit, "GROUPS", 2)
    at = bandit.mean_at_kl(metrics, grid)
    assert at[1].tolist() == pytest.approx([1, 1]) and at[3].tolist() == pytest.approx([4, 2.8]) and at[4].isnan().all()


def test_trajectory_starts_uniform_and_is_a_function_of_its_seed():
    args = bandit.Args(seeds=4, steps=3)
    first, again = bandit.trajectory(args, "unbiased"), bandit.trajectory(args, "unbiased")
    assert torch.equal(first, again) and first.shape == (4, 3, 4)
    assert first[0, 2].abs().max() < 1e-12 and (first[1:, 2] > 0).all()
    assert torch.equal(first[0], bandit.trajectory(args, "mean")[0])  # the same arms for every estimator
