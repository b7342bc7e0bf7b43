"""The advantages of majority_pg.py against exact gradients and against their definition."""

import pytest
import torch
from enumeration import ANSWERS, exact_gradient, expected_gradient, majority_value, subset_advantages

from majority_pg import advantages

# Rewards that are a function of the answer: prompt 0 has an action without an answer, prompt 1 two with the same.
REWARDS = torch.tensor([[0.25, 1.0, -0.5, 0.0], [1.0, 0.25, 0.25, 2.0]], dtype=torch.float64)


def majority_objective(b, y):
    return majority_value([(ANSWERS[b, a].item(), REWARDS[b, a].item()) for a in y])


def sampled_advantages(k, estimator):
    return lambda b, y: advantages(ANSWERS[b][y], REWARDS[b][y], k, estimator)


@pytest.mark.parametrize(
    "k, n", [(1, 1), (1, 3), (2, 2), (3, 3), (4, 4), (2, 3), (2, 4), (3, 4), (2, 5), (3, 5), (5, 5)]
)
def test_unbiased_is_the_gradient_of_majority_at_k(k, n):
    estimate = expected_gradient(sampled_advantages(k, "unbiased"), n)
    torch.testing.assert_close(estimate, exact_gradient(majority_objective, k), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k, n", [(2, 2), (3, 3), (4, 4), (3, 4), (4, 5), (3, 5)])
def test_biased_is_the_gradient_of_majority_at_k_minus_1(k, n):
    estimate = expected_gradient(sampled_advantages(k, "biased"), n)
    torch.testing.assert_close(estimate, exact_gradient(majority_objective, k - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("k, n", [(2, 2), (2, 7), (3, 7), (4, 7), (7, 7)])
def test_counting_is_the_average_over_all_subsets(k, n, centred):
    """(k/n) mean over k-subsets T containing i of A_i(T), by enumeration. In the last ten rows the reward is not a
    function of the answer, and an answer is worth the mean reward of its samples in T."""
    generator = torch.Generator().manual_seed(k * n)
    votes = torch.randint(-1, 4, (30, n), generator=generator)
    rewards = torch.randint(-2, 3, (30, 5), generator=generator).double().gather(1, votes + 1).masked_fill(votes < 0, 0)
    rewards[20:] = torch.randint(-2, 3, (10, n), generator=generator).double()
    actual = advantages(votes, rewards, k, "biased" if centred else "unbiased")
    for b, row in enumerate(zip(votes.tolist(), rewards.tolist())):
        definition = subset_advantages(majority_value, list(zip(*row)), k, centred)
        assert actual[b].tolist() == pytest.approx(definition, abs=1e-12)


def test_only_votes_that_change_the_outcome_have_an_advantage():
    votes = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    rewards = (votes == 0).float()
    A = advantages(votes, rewards, 4)
    # row 1: a tie is worth 1/2; taking a right vote away loses it, taking a wrong one away wins
    assert A.tolist() == [[0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert advantages(torch.tensor([[0, 1, 2, 2]]), torch.tensor([[1.0, 0, 0, 0]]), 4)[0].tolist() == pytest.approx(
        [0, 0, -1 / 3, -1 / 3]
    )


def test_exact_zeros_are_zero_and_large_groups_are_finite():
    votes = torch.randint(-1, 12, (8, 64), generator=torch.Generator().manual_seed(0))
    assert (advantages(votes.clamp(min=0), torch.full((8, 64), 0.1), 16) == 0).all()
    A = advantages(votes, (votes == 3).float(), 16)
    assert A.dtype == torch.float32 and A.isfinite().all() and (A <= 1).all()
    assert (A[votes == 3] >= 0).all() and (A[votes == 3] > 0).any()


def test_agreeing_with_the_vote_is_another_objective():
    """The example of docs/majority.md: probabilities .5 (wrong), .3 (right), .2 (wrong), k = 3. Agreement as a reward
    pushes towards the most likely answer, here the wrong one; maj@k pushes towards the right one."""
    theta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    log_pi = theta.log_softmax(-1)
    y = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    p = log_pi[y].sum(-1).exp().detach()

    def gradient(A):
        return torch.autograd.grad((p * (A * log_pi[y]).sum(-1)).sum(), theta, retain_graph=True)[0]

    maj = gradient(advantages(y, (y == 1).double(), 3))
    share = torch.nn.functional.one_hot(y, 3).sum(1)  # (27, 3) votes of each answer
    winners = (share == share.amax(-1, keepdim=True)).double()
    agree = (winners / winners.sum(-1, keepdim=True)).gather(1, y)  # reward: agreement with the (split) vote
    ttrl = gradient((agree - agree.mean(-1, keepdim=True)) / 2)
    assert maj[1] > 0 > maj[0] and ttrl[0] > 0 > ttrl[1]


def test_bad_input_is_refused():
    votes, rewards = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="unknown estimator"):
        advantages(votes, rewards, 2, "vote")
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        advantages(votes, rewards.index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(torch.inf)), 2)
