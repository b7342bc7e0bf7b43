"""docs/papers.md: each method's formula, restated from its paper, against our call; and which objective it ascends.
Tang's, Chow's, PKPO's loo-1, MaxPO's and pass^k, which are definitions here: test_golden.py.

M_i is the mean of f over the k-subsets of the n samples that contain i, M_-i over those that do not, M over all."""

import itertools
import math
from functools import partial

import pytest
import spectrum
import torch
from enumeration import ANSWERS, GRADED, exact_gradient, expected_gradient, subset_mean
from test_estimators import OBJECTIVES

import common
from pass_at_k_pg import advantages
from recipes import baselines

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def rewards_of(n, seed=0):
    """(20, n) of five values, with ties; the last row is 0 throughout."""
    r = torch.randint(5, (20, n), generator=torch.Generator().manual_seed(seed)).double() / 4
    r[-1] = 0
    return r


def right_or_wrong(n):
    """All rows of n rewards 0 and 1: (2^n, n)."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def credits(f, rows, k):
    """M_i and M_-i, (B, n) each (M_-i is nan if k = n), and M, (B, 1); rows: lists of samples; f of a list."""
    n, parts = len(rows[0]), []
    for row in rows:
        values = {T: f([row[i] for i in T]) for T in itertools.combinations(range(n), k)}
        inside = [[value for T, value in values.items() if i in T] for i in range(n)]
        outside = [[value for T, value in values.items() if i not in T] or [math.nan] for i in range(n)]
        parts.append([sum(x) / len(x) for x in (*inside, *outside, [*values.values()])])
    return torch.tensor(parts, dtype=torch.float64).split([n, n, 1], -1)


def different_right(pairs):
    """How many different right answers among (vote, reward) pairs."""
    return float(len({vote for vote, reward in pairs if reward == 1 and vote >= 0}))


def largest_block(votes):
    return float(max(map(votes.count, votes), default=0))


def metric_of(f):
    """The mean of f over all k-subsets, (B, n) columns -> (B,), by listing them."""

    def metric(*columns):
        *columns, k = columns
        rows = [list(zip(*row)) if len(row) > 1 else list(row[0]) for row in zip(*(c.tolist() for c in columns))]
        return torch.tensor([subset_mean(f, row, k) for row in rows], dtype=torch.float64)

    return metric


OF_PAIRS = OBJECTIVES | {"different right answers": (metric_of(different_right), ANSWERS, different_right)}


@pytest.mark.parametrize("k, n", [(1, 4), (2, 5), (3, 5), (4, 5)])
@pytest.mark.parametrize("name", OF_PAIRS)
def test_one_identity_behind_three_papers(name, k, n):
    """M_i - M = (n-k)/k b(k+1), and b(k+1) = (k/n) (M_i - M_-i): any set function, ties and all."""
    metric, first, f = OF_PAIRS[name]
    y = torch.randint(4, (6, n), generator=torch.Generator().manual_seed(0))
    columns = first[1][y], GRADED[1][y]
    inside, outside, all_ = credits(f, [list(zip(*row)) for row in zip(*(x.tolist() for x in columns))], k)
    b = common.k_sample_advantages(metric, *columns, k=k + 1, estimator="biased")
    assert b.abs().max() > 0.01
    close(inside - all_, (n - k) / k * b)
    close(b, k / n * (inside - outside))


def test_pkpos_second_form_is_unbiased_and_not_centred():
    """Leave-one-out: (k/n) M_i - k/(n-1) M_-i."""

    def second(rewards, k, n):
        inside, outside, _ = credits(max, rewards.tolist(), k)
        return k / n * inside - k / (n - 1) * outside, outside

    for k, n in ((2, 5), (3, 5), (4, 5)):
        A, outside = second(rewards_of(n), k, n)
        close(A, advantages(rewards_of(n), k + 1, "biased") - k / (n * (n - 1)) * outside)
        assert A.sum(-1).abs().max() > 0.1
    exact = exact_gradient(lambda b, y: max(GRADED[b, a].item() for a in y), 2)
    close(expected_gradient(lambda b, y: second(GRADED[b][y], 2, 4)[0], 4), exact, rtol=1e-10)


@pytest.mark.parametrize("k, n", [(1, 8), (4, 8), (7, 8)])
def test_chen_et_al_are_b_divided_by_a_standard_deviation(k, n):
    """Analytic pass@k for 0/1: reward of a group R = 1 - C(N_neg, k)/C(n, k), sigma = sqrt(R (1 - R)); a positive has
    (1 - R)/sigma, a negative (1 - R - C(N_neg - 1, k - 1)/C(n - 1, k - 1))/sigma."""
    for c in range(1, n + 1):
        r = torch.tensor([[1.0] * c + [0.0] * (n - c)], dtype=torch.float64)
        R = 1 - math.comb(n - c, k) / math.comb(n, k)
        if sigma := math.sqrt(R * (1 - R)):
            negative = (1 - R - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma
            A = r * (1 - R) / sigma + (1 - r) * negative
            close(A, (n - k) / k * advantages(r, k + 1, "biased") / sigma)


def test_maxrl_and_its_relatives():
    """(r_i - c/n) / c with c right ones, 0 without any. TailRL, for graded rewards: uncentred, sum over k of A^(k)/k,
    A^(1) = r/n; 1, .5, 0, 0 give .75, .25, 0, 0 and not r over their sum. The limit of RS-GRPO: beta A_RS."""
    r = right_or_wrong(6)
    c = r.sum(-1, keepdim=True)
    close(advantages(r, 1, "maxrl"), torch.where(c > 0, (r - c / 6) / c.clamp(min=1), 0))
    close(40 * rs_grpo(r[1:], 40.0), advantages(r[1:], 1, "maxrl"))
    r, A = torch.tensor([[[1.0, 0.5, 0, 0]], [[0.75, 0.25, 0, 0]]], dtype=torch.float64)
    close(r / 4 + sum(advantages(r, k) / k for k in range(2, 5)), A)


def rs_grpo(r, beta):
    """(e^(beta r) / mean e^(beta r) - 1) / beta, over n."""
    e = (beta * r).exp()
    return (e / e.mean(-1, keepdim=True) - 1) / beta / r.shape[-1]


def test_rs_grpo_by_the_spectrum():
    """For n to infinity: (1/beta) sum_j (1-e^-beta)^j / j pass@j, by the slope U' = n sum_m D(m) Binom(m; n-1, p)."""
    r = right_or_wrong(8)
    close(spectrum.rs_grpo(r, 4), rs_grpo(r, 1.0))
    p, n = 0.3, 100
    for beta in (0.5, 2.0):
        D = spectrum.worth(partial(rs_grpo, beta=beta), n)
        slope = n * (D * spectrum.binomial(n - 1, torch.tensor(p))).sum().item()
        q = 1 - math.exp(-beta)
        population = sum(q**j * (1 - p) ** (j - 1) for j in range(1, 400)) / beta
        assert slope == pytest.approx(population, rel=0.02)


def test_ttrl_is_the_largest_block_but_for_ties():
    """Reward 1 for the most frequent answer, centred, is b(n) of f = size of the largest block where that is unique."""
    votes = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 2, 3]])
    b = common.k_sample_advantages(metric_of(largest_block), votes, k=4, estimator="biased")
    for row, A in zip(votes.tolist(), b):
        top = [x for x in set(row) if row.count(x) == max(map(row.count, row))]
        reward = torch.tensor([float(x == top[0]) for x in row], dtype=torch.float64)
        close(A, reward - reward.mean() if len(top) == 1 else torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("n", [4, 8])
def test_grpo_dr_grpo_rloo_reinforce(n):
    """Over n: (r - mean)/std of n - 1 degrees; (r - mean); r less the mean of the others; r."""
    r = right_or_wrong(n)
    c = r.sum(-1, keepdim=True)
    std = (c * (n - c) / n / (n - 1)).sqrt()
    close(spectrum.grpo(r, 1), torch.where(std > 0, (r - c / n) / std.clamp(min=1e-9), 0) / n)
    close(spectrum.dr_grpo(r, 1), (r - c / n) / n)
    close(advantages(r, 1, "mean"), (r - (c - r) / (n - 1)) / n)
    close(spectrum.reinforce(r, 1), r / n)


@pytest.mark.parametrize("k, n", [(3, 5), (2, 4)])
def test_mistakes_seen_in_the_wild(k, n):
    """Plain subset credit less the group's mean is (n-k)/n b(k+1) and so (1 - k/n) grad J_k, 0 at n = k. A public
    "pkpo", the mean over T with i of f(T) - f(T without i), less the others' mean, mixes b(k+1) and b(k)."""
    r = rewards_of(n)
    inside, _, _ = credits(max, r.tolist(), k)
    credit = k / n * inside
    close(credit - credit.mean(-1, keepdim=True), (n - k) / n * advantages(r, k + 1, "biased"))
    credit = n / k * advantages(r, k)
    others = (credit.sum(-1, keepdim=True) - credit) / (n - 1)
    above, own = advantages(r, k + 1, "biased"), advantages(r, k, "biased")
    close(credit - others, n**2 / (k * (n - 1)) * ((1 - k / n) * above + k / n * own))


@pytest.mark.parametrize("k, n", [(1, 5), (2, 5), (4, 5), (5, 5)])
def test_the_family_has_one_worth_and_these_baselines(k, n):
    m = torch.arange(n, dtype=torch.float64)
    expected = {baselines.u: 0 * m, baselines.others: m / (n - 1), baselines.posterior: (m + 1) / (n + 1)}
    expected |= {baselines.b: m / (n - k)} if k < n else {}
    expected |= {baselines.u: m / (n - 1)} if k == 1 else {}  # RLOO's
    D = torch.tensor([float(x) for x in spectrum.worth_of_pass_at(n, k)], dtype=torch.float64)
    for rule, beta in expected.items():
        close(spectrum.worth(partial(rule, k=k), n), D)
        close(spectrum.baseline(partial(rule, k=k), n)[D > 0], beta[D > 0])
    r = rewards_of(5)  # its ends: RLOO and Tang
    close(baselines.others(r, 1), advantages(r, 1, "mean"))
    close(baselines.others(r, 5), advantages(r, 5))
