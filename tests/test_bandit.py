"""The closed forms of bandit.py, by enumeration, and its advantages, by hand."""

import pytest
import torch

import bandit


def test_exact_metrics_by_enumeration():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=generator).sort(-1).values
    rewards[2, 1] = rewards[2, 2]  # a tie
    pi = torch.randn(3, 5, dtype=torch.float64, generator=generator).softmax(-1)
    y = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3)
    mean, kl = (pi * rewards).sum(-1), (pi * (pi / 0.2).log()).sum(-1)  # (3,)
    best = (pi[:, y].prod(-1) * rewards[:, y].amax(-1)).sum(-1)  # (3, 125, 3) -> (3,)
    torch.testing.assert_close(bandit.exact_metrics(pi.log(), rewards, 3), torch.stack([mean, best, kl]))


def test_advantages_by_hand():
    """Rewards 3, 1, 0: the best adds 3 - 1 to the maximum. The others' means are .5, 1.5 and 2."""
    rewards = torch.tensor([[3.0, 1, 0]], dtype=torch.float64)
    expected = {"mean": [2.5 / 3, -0.5 / 3, -2 / 3], "mean x k": [2.5, -0.5, -2], "unbiased": [2, 0, 0],
                "biased": [4 / 3, -2 / 3, -2 / 3]}  # fmt: skip
    found = {name: bandit.advantages(rewards, name)[0].tolist() for name in expected}
    assert found == {name: pytest.approx(A) for name, A in expected.items()}


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


def test_a_group_of_one_is_refused(refused):
    assert refused("bandit.py", "--k", "1") == "error: --k must be at least 2, not 1"
