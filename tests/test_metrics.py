"""leave_one_out and the exact k-sample metrics, against enumeration of all subsets."""

import math

import pytest
import torch

import common
import majority_pg
from enumeration import ANSWERS, GRADED, best_of_value, exact_gradient, expected_gradient, majority_value, subset_mean


def random_groups(B, n, seed=0):
    """Votes (B, n) with blanks, rewards that depend on the vote, scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randint(-1, 4, (B, n), generator=generator)
    of_answer = torch.randint(0, 4, (B, 5), generator=generator).double() / 2
    return votes, of_answer.gather(1, votes + 1), torch.randint(0, 3, (B, n), generator=generator).double()


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


@pytest.mark.parametrize("k, n", SIZES)
def test_majorities_without_each_sample(k, n):
    votes, rewards, _ = random_groups(20, n, seed=1)
    everyone, without = majority_pg.subset_majorities(votes, rewards, k, leave_out=True)
    for b, row in enumerate([list(zip(v, r)) for v, r in zip(votes.tolist(), rewards.tolist())]):
        assert everyone[b].tolist() == pytest.approx(
            [subset_mean(majority_value, row, j) for j in (k, k - 1)], abs=1e-12
        )
        for i in range(n):
            others = row[:i] + row[i + 1 :]
            expected = [subset_mean(majority_value, others, j) for j in (min(k, n - 1), k - 1)]
            assert without[b, i].tolist() == pytest.approx(expected, abs=1e-12)


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


def test_large_groups():
    """n = 256, k = 64, where enumeration is out of the question, against what is known of them."""
    n, k = 256, 64
    rewards = torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (common.pass_at_k(rewards, k) > rewards.topk(20).values[:, -1]).all()
    assert torch.allclose(common.pass_at_k(rewards, n), rewards.amax(-1), rtol=1e-12)
    assert torch.allclose(common.pass_at_k(rewards, 1), rewards.mean(-1), rtol=1e-12)
    # Two answers: a majority of k = 64 of c votes out of 256 is a hypergeometric tail, half of the tie counting.
    for c in (100, 128, 150):
        votes = (torch.arange(n) >= c).long().unsqueeze(0)
        ways = [math.comb(c, t) * math.comb(n - c, k - t) for t in range(k + 1)]
        expected = (sum(ways[k // 2 + 1 :]) + ways[k // 2] / 2) / math.comb(n, k)
        actual = majority_pg.majority_at_k(votes, (votes == 0).double(), k).item()
        assert actual == pytest.approx(expected, rel=1e-10)
    # All answers different: every one of a subset's k ties.
    votes = torch.arange(n).unsqueeze(0)
    assert majority_pg.majority_at_k(votes, rewards[:1], k).item() == pytest.approx(rewards[0].mean().item(), rel=1e-11)


def test_blank_responses_do_not_vote_together():
    votes, rewards = torch.tensor([[-1, -1, -1, 3], [-1, -1, -1, -1]]), torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]])
    assert majority_pg.majority_at_k(votes, rewards, 4).tolist() == pytest.approx([1, 0], abs=1e-14)


def test_a_reward_that_is_not_a_function_of_the_answer_counts_by_its_mean():
    votes, rewards = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1.0, 0.0, 0.5, 1.0]])
    assert majority_pg.majority_at_k(votes, rewards, 3).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "metric", [majority_pg.majority_at_k, common.best_of_k, lambda _, r, k: common.pass_at_k(r, k)]
)
@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(metric, k):
    with pytest.raises(ValueError, match=f"k={k} with n=4"):
        metric(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), k)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_leave_one_out_is_unbiased_for_all_four_objectives(k):
    """Lemma 1 of Tang et al. for the mean, pass@k, majority and Best-of-N, n = k."""
    scores = torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 0.0, 2.0, 2.0]], dtype=torch.float64)

    for function, first in [
        (lambda pairs: sum(r for _, r in pairs) / len(pairs), scores),
        (lambda pairs: max(r for _, r in pairs), scores),
        (majority_value, ANSWERS),
        (best_of_value, scores),
    ]:

        def f(b, y):
            return function([(first[b, a].item(), GRADED[b, a].item()) for a in y])

        def advantages(b, y):
            def objective(actions):  # (..., m) int64 -> (...)
                rows = actions.reshape(-1, actions.shape[-1]).tolist()
                return torch.tensor([f(b, row) for row in rows], dtype=torch.float64).view(actions.shape[:-1])

            return common.leave_one_out(objective, y)

        torch.testing.assert_close(expected_gradient(advantages, k), exact_gradient(f, k), rtol=1e-10, atol=1e-12)


def test_leave_one_out_of_the_mean_is_rloo():
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    expected = (rewards - (9 - rewards) / 2) / 3
    torch.testing.assert_close(common.leave_one_out(lambda r: r.mean(-1), rewards), expected)
