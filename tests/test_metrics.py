"""The exact k-sample metrics, and the advantages that follow from a metric, against enumeration."""

import math
from fractions import Fraction

import pytest
import torch
from enumeration import ANSWERS, GRADED, best_of_value, exact_gradient, expected_gradient, majority_value, subset_mean

import bon_rl
import common
import majority_pg
import pass_at_k_pg
from common import k_sample_advantages


def random_groups(B, n, seed=0):
    """Votes (B, n) with blanks, rewards that depend on the vote, scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randint(-1, 4, (B, n), generator=generator)
    of_answer = torch.randint(0, 4, (B, 5), generator=generator).double() / 2
    return votes, of_answer.gather(1, votes + 1), torch.randint(0, 3, (B, n), generator=generator).double()


@pytest.mark.parametrize("k, n", [(4, 6), (3, 7)])
def test_equal_rewards_have_no_advantage_whatever_type_the_metric_computes_in(k, n):
    """In float32 the three terms leave 6e-8, and AdamW would make full steps of it."""
    A = k_sample_advantages(lambda rewards, k: rewards.amax(-1), torch.ones(1, n), k=k)
    assert A.tolist() == [[0] * n] and A.dtype == torch.float64


SIZES = [(1, 1), (1, 4), (2, 2), (2, 3), (2, 7), (3, 7), (6, 7), (7, 7), (4, 8)]


@pytest.mark.parametrize("k, n", SIZES)
def test_metrics_are_the_averages_over_all_subsets(k, n):
    votes, rewards, scores = random_groups(40, n)
    for metric, first, value in [
        (majority_pg.majority_at_k, votes, majority_value),
        (common.best_of_k, scores, best_of_value),
        (lambda r, _, k: common.pass_at_k(r, k), rewards, lambda pairs: max(r for _, r in pairs)),
    ]:
        rows = [list(zip(a, r)) for a, r in zip(first.tolist(), rewards.tolist())]
        expected = torch.tensor([subset_mean(value, row, k) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(metric(first, rewards, k), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "n, c, k, expected",
    [
        (8, 8, 4, 1.0),  # all right
        (8, 0, 4, 0.0),  # all wrong
        (4, 1, 4, 1.0),  # n = k
        (5, 2, 4, 1.0),  # n - c < k: no subset without a success
        (4, 1, 1, 0.25),
        (10, 3, 5, 1 - math.comb(7, 5) / math.comb(10, 5)),
        (256, 3, 64, 1 - math.comb(253, 64) / math.comb(256, 64)),
    ],
)
def test_pass_at_k_of_binary_rewards(n, c, k, expected):
    rewards = (torch.arange(n) < c).float().unsqueeze(0)
    assert common.pass_at_k(rewards, k).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "n, k, c", [(256, 64, 100), (256, 64, 128), (256, 63, 150), (1000, 64, 300), (1000, 1000, 500)]
)
def test_majority_of_two_answers_is_a_hypergeometric_tail(n, k, c):
    """c of n samples are right, and all others agree: a tie counts half. No digit is lost where it is rare."""
    votes = (torch.arange(n) >= c).long().unsqueeze(0)
    ways = [math.comb(c, t) * math.comb(n - c, k - t) for t in range(k + 1)]
    tie = ways[k // 2] if k % 2 == 0 else 0
    expected = Fraction(2 * sum(ways[k // 2 + 1 :]) + tie, 2 * math.comb(n, k))
    actual = majority_pg.majority_at_k(votes, (votes == 0).double(), k).item()
    assert actual == pytest.approx(float(expected), rel=1e-13, abs=0)


def test_blank_responses_do_not_vote_together():
    votes, rewards = torch.tensor([[-1, -1, -1, 3], [-1, -1, -1, -1]]), torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]])
    assert majority_pg.majority_at_k(votes, rewards, 4).tolist() == pytest.approx([1, 0], abs=1e-14)


def test_where_all_answers_differ_each_of_k_wins_alike():
    rewards = torch.rand(1, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = majority_pg.majority_at_k(torch.arange(256).unsqueeze(0), rewards, 64).item()
    assert actual == pytest.approx(rewards.mean().item(), rel=1e-11)


def test_a_reward_that_is_not_a_function_of_the_answer_counts_by_its_mean():
    votes, rewards = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1.0, 0.0, 0.5, 1.0]])
    assert majority_pg.majority_at_k(votes, rewards, 3).item() == pytest.approx(0.5)


def test_the_mean_of_all_scripts_is_rloo():
    """A_i = (1/n) (r_i - mean of the others), whatever k; the gradient of the mean reward."""
    rewards, votes = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64), torch.tensor([[0, 1, 2]])
    mean = common.mean_advantages(rewards)
    torch.testing.assert_close(mean, (rewards - (9 - rewards) / 2) / 3)
    for k in (1, 2, 3):
        assert torch.equal(pass_at_k_pg.advantages(rewards, k, "mean"), mean)
        assert torch.equal(majority_pg.advantages(votes, rewards, k, "mean"), mean)
        assert torch.equal(bon_rl.advantages(rewards, -rewards, k, "mean"), mean)
    exact = exact_gradient(lambda b, y: GRADED[b, y[0]].item(), 1)
    for n in (1, 2, 4):
        estimate = expected_gradient(lambda b, y: common.mean_advantages(GRADED[b][y]), n)
        torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-12)


# --- k_sample_advantages: any objective from its metric ---


def pass_hat_k(rewards, k):
    """pass^k, all of k right: the example of an objective of one's own in docs/own.md; min for graded rewards."""
    return -common.pass_at_k(-rewards, k)


SCORES = torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
OBJECTIVES = {  # name -> metric, what it takes of each action beside the reward, the value of (that, reward) pairs
    "pass@k": (lambda _, rewards, k: common.pass_at_k(rewards, k), SCORES, lambda pairs: max(r for _, r in pairs)),
    "maj@k": (majority_pg.majority_at_k, ANSWERS, majority_value),
    "bon@k": (common.best_of_k, SCORES, best_of_value),
    "pass^k": (lambda _, rewards, k: pass_hat_k(rewards, k), SCORES, lambda pairs: min(r for _, r in pairs)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 2), (4, 4), (2, 4), (3, 5)])
def test_lemma_1_is_unbiased_for_any_objective_and_centred_for_one_sample_less(k, n, name):
    metric, first, value = OBJECTIVES[name]
    for estimator, size in [("unbiased", k)] + [("biased", k - 1)] * (k > 1):
        exact = exact_gradient(lambda b, y: value([(first[b, a].item(), GRADED[b, a].item()) for a in y]), size)
        A = lambda b, y: k_sample_advantages(metric, first[b][y], GRADED[b][y], k=k, estimator=estimator)  # noqa: E731
        torch.testing.assert_close(expected_gradient(A, n), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("k, n", [(1, 1), (1, 2), (2, 2), (2, 3), (5, 5)])
def test_the_metric_is_asked_for_nothing_that_it_does_not_have(k, n, estimator):
    def metric(a, b, j):
        assert a.shape == b.shape == (len(a), a.shape[-1]) and 1 <= j <= a.shape[-1]
        return common.best_of_k(a, b, j)

    samples = torch.rand(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = k_sample_advantages(metric, *samples, k=k, estimator=estimator)
    assert A.shape == (3, n) and A.dtype == torch.float64


def test_one_sample_is_its_own_worth_and_k_1_is_rloo():
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    assert k_sample_advantages(pass_hat_k, rewards[:, :1], k=1).tolist() == [[1.0]]
    torch.testing.assert_close(k_sample_advantages(pass_hat_k, rewards, k=1), common.mean_advantages(rewards))
    assert k_sample_advantages(pass_hat_k, rewards, k=1, estimator="biased").tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_what_rounding_leaves_of_a_zero_is_zero_at_any_scale(estimator):
    scale = torch.tensor([[1e-200], [0.1], [1e200]], dtype=torch.float64)
    A = k_sample_advantages(pass_hat_k, (scale * 0.7).expand(-1, 9), k=4, estimator=estimator)
    assert (A == 0).all()
    tiny = scale * torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0 + 1e-9]], dtype=torch.float64)  # small, but not rounding's
    assert (k_sample_advantages(common.pass_at_k, tiny, k=2, estimator=estimator)[:, -1] > 0).all()


VOTES = torch.zeros(2, 4, dtype=torch.int64)
OF_K = {
    "pass@k": common.pass_at_k,
    "best of k": lambda r, k: common.best_of_k(r, r, k),
    "maj@k": lambda r, k: majority_pg.majority_at_k(VOTES, r, k),
    "pass_at_k_pg": pass_at_k_pg.advantages,
    "majority_pg": lambda r, k: majority_pg.advantages(VOTES, r, k),
    "bon_rl": lambda r, k: bon_rl.advantages(r, r, k),
    "k-sample": lambda r, k: k_sample_advantages(pass_hat_k, r, k=k),
    "k-sample, biased": lambda r, k: k_sample_advantages(pass_hat_k, r, k=k, estimator="biased"),
}


@pytest.mark.parametrize("name", OF_K)
def test_bad_arguments_are_refused(name):
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} with n=4"):
            OF_K[name](torch.zeros(2, 4), k)
    with pytest.raises(ValueError, match="unknown estimator 'mean'"):
        k_sample_advantages(pass_hat_k, torch.zeros(2, 4), k=2, estimator="mean")
