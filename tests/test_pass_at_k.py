"""The advantages of pass_at_k_pg.py against exact gradients and against their definition."""

import pytest
import torch
from enumeration import BINARY, GRADED, PROMPTS, exact_gradient, expected_gradient, subset_advantages

import common
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


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("k, n", [(1, 6), (2, 6), (4, 6), (6, 6), (8, 24)])
def test_the_closed_form_is_what_follows_from_the_metric(k, n, estimator):
    rewards = torch.rand(20, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = common.k_sample_advantages(common.pass_at_k, rewards, k=k, estimator=estimator)
    torch.testing.assert_close(advantages(rewards, k, estimator), expected, rtol=1e-9, atol=1e-12)


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


def test_rows_are_independent_and_order_does_not_matter():
    rewards = GRADED.repeat(1, 2)
    together = advantages(rewards, 3)
    for b in range(PROMPTS):
        torch.testing.assert_close(advantages(rewards[b : b + 1], 3), together[b : b + 1])
    permutation = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    torch.testing.assert_close(advantages(rewards[:, permutation], 3), together[:, permutation])


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
    """sum_{j<n} pass@j / j (max@j for these graded rewards, with ties), magnitude included."""
    exact = sum(exact_gradient(lambda b, y: max(GRADED[b, a].item() for a in y), j) / j for j in range(1, n))
    estimate = expected_gradient(lambda b, y: advantages(GRADED[b][y], 1, "maxrl"), n)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [4, 8])
def test_maxrl_of_rewards_0_and_1_divides_by_the_number_of_successes(n):
    """Both sums over k: uncentred r_i / c, with A^(1) = r_i / n; centred, as used, (r_i - c/n) / c; 0 without any."""
    for c in range(n + 1):
        r = torch.zeros(1, n, dtype=torch.float64)
        r[0, :c] = 1
        uncentred = r / n + sum(advantages(r, k, "unbiased") / k for k in range(2, n + 1))
        centred = advantages(r, 1, "maxrl")
        torch.testing.assert_close(uncentred, r / max(c, 1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(centred, (r - c / n) / max(c, 1) if c else r, rtol=1e-12, atol=1e-12)


def test_maxrl_of_graded_rewards_is_the_sum_over_k_not_r_over_their_sum():
    r = torch.tensor([[1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)
    uncentred = r / 4 + sum(advantages(r, k, "unbiased") / k for k in range(2, 5))
    torch.testing.assert_close(uncentred, torch.tensor([[0.75, 0.25, 0, 0]], dtype=torch.float64))
    assert advantages(r, 1, "maxrl").sum().abs() < 1e-12 and advantages(r[:, :1], 1, "maxrl").tolist() == [[0.0]]
