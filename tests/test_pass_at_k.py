"""The advantages of pass_at_k_pg.py against exact gradients and against their definition."""

import pytest
import torch
from enumeration import BINARY, GRADED, exact_gradient, expected_gradient, subset_advantages

from pass_at_k_pg import advantages


def max_objective(rewards):
    return lambda b, y: max(rewards[b, a].item() for a in y)


def sampled_advantages(rewards, k, estimator):
    return lambda b, y: advantages(rewards[b][y], k, estimator)


@pytest.mark.parametrize("rewards", [GRADED, BINARY], ids=["graded", "binary"])
@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 2), (3, 3), (4, 4), (2, 3), (2, 4), (3, 4), (2, 5), (3, 5)])
def test_unbiased_is_the_gradient_of_pass_at_k(rewards, k, n):
    estimate = expected_gradient(sampled_advantages(rewards, k, "unbiased"), n)
    torch.testing.assert_close(estimate, exact_gradient(max_objective(rewards), k), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rewards", [GRADED, BINARY], ids=["graded", "binary"])
@pytest.mark.parametrize("k, n", [(2, 2), (3, 3), (4, 4), (3, 4), (2, 5), (3, 5), (4, 5)])
def test_biased_is_the_gradient_of_pass_at_k_minus_1(rewards, k, n):
    estimate = expected_gradient(sampled_advantages(rewards, k, "biased"), n)
    torch.testing.assert_close(estimate, exact_gradient(max_objective(rewards), k - 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("k, n", [(2, 2), (2, 7), (3, 7), (5, 7), (7, 7)])
def test_closed_form_is_the_average_over_all_subsets(k, n, centred):
    rewards = torch.randint(-3, 4, (50, n), generator=torch.Generator().manual_seed(k * n)).double() / 2
    definition = [subset_advantages(lambda row: max(row, default=0.0), row, k, centred) for row in rewards.tolist()]
    expected = torch.tensor(definition, dtype=torch.float64)
    actual = advantages(rewards, k, "biased" if centred else "unbiased")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_binary_rewards_signal_only_where_one_subset_has_a_single_success():
    A = advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 4)
    assert A.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert advantages(torch.tensor([[1.0, 1, 0, 0]]), 2)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("estimator", ["mean", "unbiased", "biased"])
def test_integer_and_bool_rewards_are_not_truncated(estimator):
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]])
    expected = advantages(rewards.float(), 2, estimator)
    assert expected.abs().max() < 1
    assert torch.equal(advantages(rewards, 2, estimator), expected)
    assert torch.equal(advantages(rewards.bool(), 2, estimator), expected)


def test_large_groups_stay_finite_and_exact_in_float32():
    rewards = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))
    for k in (2, 64, 2048, 4096):
        A = advantages(rewards, k)
        assert A.dtype == torch.float32 and A.isfinite().all() and (A >= 0).all() and A.max() > 0
        exact = advantages(rewards.double(), k)
        torch.testing.assert_close(A.double(), exact, rtol=1e-6, atol=1e-12)


def test_bad_input_is_refused_with_its_position():
    rewards = torch.zeros(2, 4)
    rewards[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        advantages(rewards, 2)
    with pytest.raises(ValueError, match="unknown estimator 'max'"):
        advantages(torch.zeros(2, 4), 2, "max")


# --- MaxRL, the whole family at once ---


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_is_the_gradient_of_the_truncated_log_likelihood(n):
    """sum_{j<n} pass@j / j (max@j for these graded rewards, with ties); by value: test_papers.py."""
    exact = sum(exact_gradient(max_objective(GRADED), j) / j for j in range(1, n))
    estimate = expected_gradient(sampled_advantages(GRADED, 1, "maxrl"), n)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-12)
    assert advantages(GRADED[:, :1], 1, "maxrl").tolist() == [[0], [0]]  # of a single sample
