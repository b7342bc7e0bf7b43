"""The metrics of all scripts and the advantages that follow from them: exact gradients by enumeration, their
definition as an average over subsets, and values by hand.

The other estimators of Best-of-N: test_best_of_n.py, test_bon_sft.py. Rewards of any type: test_hostile_input.py."""

import math
from fractions import Fraction
from functools import partial

import enumeration
import pytest
import torch
from enumeration import ANSWERS, BINARY, GRADED, exact_gradient, expected_gradient, subset_mean

import bon_rl
import common
import majority_pg
import pass_at_k_pg
from common import k_sample_advantages
from recipes.all_right import metric as pass_hat_k

# Rewards that are a function of the answer: prompt 0 has an action without an answer, prompt 1 two with the same.
OF_ANSWER = torch.tensor([[0.25, 1.0, -0.5, 0.0], [1.0, 0.25, 0.25, 2.0]], dtype=torch.float64)
SCORES = torch.tensor([[0.1, 3.0, 1.0, 1.0], [2.0, 2.0, -1.0, 5.0]], dtype=torch.float64)  # wrong, with ties


def best_value(pairs):
    return max((reward for _, reward in pairs), default=0.0)


OBJECTIVES = {  # name -> metric, what it takes of each action beside the reward, the value of (that, reward) pairs
    "pass@k": (lambda _, rewards, k: common.pass_at_k(rewards, k), SCORES, best_value),
    "maj@k": (majority_pg.majority_at_k, ANSWERS, enumeration.majority_value),
    "bon@k": (common.best_of_k, SCORES, enumeration.best_of_value),
    "pass^k": (lambda _, rewards, k: pass_hat_k(rewards, k), SCORES, lambda pairs: min(r for _, r in pairs)),
}


def lemma_1(metric):
    return lambda first, rewards, k, estimator: k_sample_advantages(metric, first, rewards, k=k, estimator=estimator)


OWN, BON = ("mean", "unbiased", "biased"), ("mean", "exact")
of_pass_at_k = lambda _, rewards, *options: pass_at_k_pg.advantages(rewards, *options)  # noqa: E731
of_best_of_n = lambda scores, rewards, *options: bon_rl.advantages(rewards, scores, *options)  # noqa: E731
ESTIMATORS = {  # name -> (what the objective takes, rewards, k, name) -> advantages; rewards; the objective; its names
    "pass_at_k_pg, graded": (of_pass_at_k, GRADED, "pass@k", OWN),
    "pass_at_k_pg, 0/1": (of_pass_at_k, BINARY, "pass@k", OWN),
    "majority_pg": (majority_pg.advantages, OF_ANSWER, "maj@k", OWN),
    "bon_rl, graded": (of_best_of_n, GRADED, "bon@k", BON),
    "bon_rl, 0/1": (of_best_of_n, BINARY, "bon@k", BON),
    **{f"Lemma 1, {name}": (lemma_1(metric), GRADED, name, OWN[1:]) for name, (metric, *_) in OBJECTIVES.items()},
}
SIZES = [(1, 1), (1, 3), (2, 2), (3, 3), (4, 4), (2, 3), (2, 4), (3, 4), (2, 5), (3, 5), (4, 5)]


@pytest.mark.parametrize("k, n", SIZES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expected_gradient_is_exact(name, k, n):
    """`mean` has the gradient of the mean reward, `biased` the one for k - 1, the others the one for k: in magnitude,
    with ties and graded rewards."""
    advantages, rewards, objective, names = ESTIMATORS[name]
    _, first, value = OBJECTIVES[objective]
    sizes = {"mean": 1, "unbiased": k, "exact": k, "biased": k - 1}
    for estimator in (x for x in names if sizes[x] > 0):
        f = lambda b, y: value([(first[b, a].item(), rewards[b, a].item()) for a in y])  # noqa: E731
        estimate = expected_gradient(lambda b, y: advantages(first[b][y], rewards[b][y], k, estimator), n)
        torch.testing.assert_close(estimate, exact_gradient(f, sizes[estimator]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k, n", [(1, 1), (1, 4), (2, 2), (2, 3), (2, 7), (3, 7), (5, 7), (6, 7), (7, 7), (4, 8)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_averages_over_all_subsets(name, k, n):
    """Scores have ties, answers blanks. In the last ten rows the reward is not a function of the answer, and an answer
    is worth the mean reward of its samples in a subset. Advantages by all subsets: test_golden.py."""
    metric, _, value = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(k * n)
    first = torch.randint(-1, 4, (30, n), generator=generator)
    rewards = torch.randint(-2, 3, (30, 5), generator=generator).double().gather(1, first + 1) / 2
    rewards[20:] = torch.randint(-2, 3, (10, n), generator=generator).double()
    rewards = rewards.masked_fill(first < 0, 0) if name == "maj@k" else rewards
    rows = [list(zip(*row)) for row in zip(first.tolist(), rewards.tolist())]
    expected = torch.tensor([subset_mean(value, row, k) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(metric(first, rewards, k), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_is_the_gradient_of_the_truncated_log_likelihood(n):
    """sum_{j<n} pass@j / j (max@j for these graded rewards, with ties); by value: test_papers.py."""
    of = lambda j: exact_gradient(lambda b, y: max(GRADED[b, a].item() for a in y), j)  # noqa: E731
    estimate = expected_gradient(lambda b, y: pass_at_k_pg.advantages(GRADED[b][y], 1, "maxrl"), n)
    torch.testing.assert_close(estimate, sum(of(j) / j for j in range(1, n)), rtol=1e-10, atol=1e-12)
    assert pass_at_k_pg.advantages(GRADED[:, :1], 1, "maxrl").tolist() == [[0], [0]]  # of a single sample


def test_only_a_sample_that_changes_the_outcome_has_an_advantage():
    A = pass_at_k_pg.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 4)
    assert A.tolist() == [[1, 0, 0, 0], *[[0, 0, 0, 0]] * 3]
    assert pass_at_k_pg.advantages(torch.tensor([[1.0, 1, 0, 0]]), 2)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])
    votes = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    A = majority_pg.advantages(votes, (votes == 0).float(), 4)
    # row 1: a tie is worth 1/2; taking a right vote away loses it, taking a wrong one away wins
    assert A.tolist() == [[0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_pass_at_k_of_binary_rewards():
    """1 - C(n-c, k) / C(n, k): all right, all wrong, no k-subset without a success, and many samples."""
    for n, c, k in ((8, 8, 4), (8, 0, 4), (4, 1, 4), (5, 2, 4), (10, 3, 5), (256, 3, 64)):
        found = common.pass_at_k((torch.arange(n) < c).float().unsqueeze(0), k).item()
        assert found == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), rel=1e-12), (n, c, k)


@pytest.mark.parametrize("n, k, c", [(256, 64, 128), (256, 63, 150), (1000, 64, 300), (1000, 1000, 500)])
def test_majority_of_two_answers_is_a_hypergeometric_tail(n, k, c):
    """c of n samples are right, and all others agree: a tie counts half. No digit is lost where it is rare."""
    votes = (torch.arange(n) >= c).long().unsqueeze(0)
    ways = [math.comb(c, t) * math.comb(n - c, k - t) for t in range(k + 1)]
    tie = ways[k // 2] if k % 2 == 0 else 0
    expected = Fraction(2 * sum(ways[k // 2 + 1 :]) + tie, 2 * math.comb(n, k))
    actual = majority_pg.majority_at_k(votes, (votes == 0).double(), k).item()
    assert actual == pytest.approx(float(expected), rel=1e-13, abs=0)


def test_majorities_by_hand():
    """Blank responses do not vote together, an answer with several rewards is worth their mean, and where all answers
    differ each of k wins alike."""
    votes = torch.tensor([[-1, -1, -1, 3], [-1, -1, -1, -1], [0, 0, 0, 1]])
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0.5, 1]])
    assert majority_pg.majority_at_k(votes, rewards, 4).tolist() == pytest.approx([1, 0, 0.5], abs=1e-14)
    rewards = torch.rand(1, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = majority_pg.majority_at_k(torch.arange(256).unsqueeze(0), rewards, 64).item()
    assert actual == pytest.approx(rewards.mean().item(), rel=1e-11)


def test_agreeing_with_the_vote_is_another_objective():
    """The example of docs/majority.md: probabilities .5 (wrong), .3 (right), .2 (wrong), k = 3. Agreement as a reward
    pushes towards the most likely answer, here the wrong one; maj@k pushes towards the right one."""
    theta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    y = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    log_p = theta.log_softmax(-1)[y]  # (27, 3)
    share = torch.nn.functional.one_hot(y, 3).sum(1)  # (27, 3): votes of each answer
    winners = (share == share.amax(-1, keepdim=True)).double()
    agree = (winners / winners.sum(-1, keepdim=True)).gather(1, y)  # (27, 3): agreement with the (split) vote
    both = majority_pg.advantages(y, (y == 1).double(), 3), common.mean_advantages(agree)
    expected = ((log_p.sum(-1).exp().detach() * (A * log_p).sum(-1)).sum() for A in both)
    maj, ttrl = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in expected)
    assert maj[1] > 0 > maj[0] and ttrl[0] > 0 > ttrl[1]


def test_large_groups_stay_finite_and_exact_in_float32():
    draw = torch.Generator().manual_seed(0)
    uniform, votes = torch.rand(2, 4096, generator=draw), torch.randint(-1, 12, (8, 64), generator=draw)
    rewards, scores = torch.randn(2, 3, 512, generator=draw)
    of_scores = [partial(bon_rl.advantages, scores=scores, N=N, estimator=estimator)
                 for N, estimator in ((256, "exact"), (128, "variational"))]  # fmt: skip
    cases = [(partial(pass_at_k_pg.advantages, k=k), uniform) for k in (2, 64, 2048, 4096)]
    cases += [(partial(majority_pg.advantages, votes, k=16), (votes == 3).float())]
    for advantages, of in [*cases, *((function, rewards) for function in of_scores)]:
        A = advantages(of)
        torch.testing.assert_close(A.double(), advantages(of.double()), rtol=1e-6, atol=1e-12)
        assert A.dtype == torch.float32 and A.isfinite().all() and A.max() > 0
    assert all((function(torch.ones(3, 512)) == 0).all() for function in of_scores)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_what_rounding_leaves_of_a_zero_is_zero_at_any_scale(estimator):
    """A metric in float32 leaves 6e-8 of its three terms, of which AdamW would make full steps."""
    scale = torch.tensor([[1e-200], [0.1], [1e200]], dtype=torch.float64)
    A = k_sample_advantages(pass_hat_k, (scale * 0.7).expand(-1, 9), k=4, estimator=estimator)
    assert (A == 0).all()
    tiny = scale * torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0 + 1e-9]], dtype=torch.float64)  # small, but not rounding's
    assert (k_sample_advantages(common.pass_at_k, tiny, k=2, estimator=estimator)[:, -1] > 0).all()
    for k, n in ((4, 6), (3, 7)):
        A = k_sample_advantages(lambda rewards, k: rewards.amax(-1), torch.ones(1, n), k=k, estimator=estimator)
        assert A.tolist() == [[0] * n] and A.dtype == torch.float64


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("k, n", [(1, 1), (1, 2), (2, 2), (2, 3), (5, 5)])
def test_the_metric_is_asked_for_nothing_that_it_does_not_have(k, n, estimator):
    def metric(a, b, j):
        assert a.shape == b.shape == (len(a), a.shape[-1]) and 1 <= j <= a.shape[-1]
        return common.best_of_k(a, b, j)

    samples = torch.rand(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = k_sample_advantages(metric, *samples, k=k, estimator=estimator)
    assert A.shape == (3, n) and A.dtype == torch.float64


@pytest.mark.parametrize("name", [*OBJECTIVES, *ESTIMATORS])
def test_bad_arguments_are_refused(name):
    (function, *others), first, rewards = (OBJECTIVES | ESTIMATORS)[name], torch.zeros(2, 4).long(), torch.zeros(2, 4)
    known = () if name in OBJECTIVES else others[-1][-1:]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} with n=4"):
            function(first, rewards, k, *known)
    if known:
        with pytest.raises(ValueError, match="unknown estimator 'vote'"):
            function(first, rewards, 2, "vote")
    if known and "Lemma" not in name:
        rewards[1, 2] = torch.nan
        with pytest.raises(ValueError, match=r"finite.*\[1, 2\]"):
            function(first, rewards, 2, *known)
