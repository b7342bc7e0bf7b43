"""tests/golden.json: rewards and the advantages of every estimator of this repository, from exact fractions.

    python tests/golden.py                  # write the file anew

A port of an estimator is checked against it: a list of {"function", "arguments", "result"}, with matrices (B, n). Each
number comes from the definition: all subsets, listed, in rational arithmetic, rounded at the end. lambda_N, the one
irrational number, is computed to 40 digits and rounded to 17."""

import json
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path

from enumeration import best_of_value, majority_value, subset_advantages

FILE = Path(__file__).with_name("golden.json")
Row = Sequence[Fraction]

BINARY = [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
GRADED = [[1, 0.5, 0.5, 0, 1, 0.25], [-0.5, 2, 0.75, 2, 2, -0.5], [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]]
VOTES = [[0, 1, 1, -1, 4, 0], [0, 1, 1, 1, 0, -1], [0, 1, 2, 3, 4, 5]]  # a tie of three answers for [1, 1, 2, 2, 3, 3]
CORRECT = [[1, 0, 0, 0, 0.5, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0.25, 0, 1, 0]]  # functions of the vote
SCORES = [[3, 1, 3, -2, 0.5, 0.5], [0, 0, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1]]


def mean(values: Sequence) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def rloo(rewards: Row) -> list[Fraction]:
    n = len(rewards)
    return [(r - mean([x for j, x in enumerate(rewards) if j != i])) / n for i, r in enumerate(rewards)]


def maxrl(rewards: Row) -> list[Fraction]:
    parts = [[a / (j - 1) for a in subset_advantages(max, rewards, j, True)] for j in range(2, len(rewards) + 1)]
    return [sum(column) for column in zip(*parts)]


def tilt(N: int) -> Fraction:
    """lambda_N: ((l-1) e^l + 1) / (e^l - 1) - log((e^l - 1) / l) = log N - (N-1)/N, to 17 digits."""
    with localcontext() as context:
        context.prec = 40
        low, high = Decimal("0.01"), Decimal(N + 2)
        target = Decimal(N).ln() - Decimal(N - 1) / N
        for _ in range(140):
            l = (low + high) / 2
            e = l.exp()
            low, high = (l, high) if ((l - 1) * e + 1) / (e - 1) - ((e - 1) / l).ln() < target else (low, l)
        context.prec = 17
        return Fraction(+low)


def winning(scores: Row, group: Sequence[int]) -> dict[int, Fraction]:
    """Each member's chance to score highest in its group; equal scores share."""
    top = max(scores[j] for j in group)
    winners = [j for j in group if scores[j] == top]
    return {j: Fraction(1, len(winners)) for j in winners}


def variational(rewards: Row, scores: Row, N: int) -> list[Fraction]:
    """Groups of N in a row: the mean over groups g of h(y) (R(y) - b), y the winner of g, see bon_rl.advantages."""
    n, A = len(rewards), []
    groups = [range(start, start + N) for start in range(0, n, N)]
    won = [winning(scores, group) for group in groups]
    R = [sum(chance * rewards[j] for j, chance in w.items()) for w in won]
    for j in range(n):
        others = [h for h in range(len(groups)) if j not in groups[h]]
        own = won[j // N].get(j, 0) * (rewards[j] - mean([R[h] for h in others]))
        beaten_by = [h for h in others if max(scores[i] for i in groups[h]) >= scores[j]]
        gain = sum(R[g] - mean([R[h] for h in others if h != g]) for g in beaten_by)  # without the groups of y and y'
        A.append((own + tilt(N) * gain / (n - N)) / len(groups))
    return A


def closed_form(rewards: Row, N: int, estimator: str) -> list[Fraction]:
    """BoN-RLB (rlb), positives only, and by all samples, with the failure rate of the row, in [.01, .99]."""
    n = len(rewards)
    p = min(max(1 - mean(rewards), Fraction(1, 100)), Fraction(99, 100))
    if estimator == "rlb-all":
        return [N * p ** (N - 1) * (r - (1 - p)) / n for r in rewards]
    subsets = list(combinations(range(n), N))
    won = [mean([winning(rewards, T).get(i, Fraction(0)) for T in subsets]) for i in range(n)]
    if estimator == "rlb":
        right, wrong = N * p ** (N - 1) / (1 - p**N), N * p / (1 - p)
    else:
        right, wrong = N * p ** (N - 1) * (1 - p) / (1 - p**N), 0
    return [share * (right if r else wrong) for share, r in zip(won, rewards)]


def sft(expert: Fraction, scores: Row, N: int, likelihood: str) -> list[Fraction]:
    """Coefficients of the expert, 1, and of n samples in grad log pi_bon(y*), see bon_sft.coefficients."""
    n = len(scores)
    if likelihood == "exact":
        p = min(max(1 - mean(scores), Fraction(1, 100)), Fraction(99, 100))
        weight = 1 / (1 - p) - N * p ** (N - 1) / (1 - p**N) if expert == 1 else (N - 1) / p
        return [Fraction(1), *((1 - s - p) / n * weight for s in scores)]
    A = [Fraction(1)]
    for j, s in enumerate(scores):
        wins = mean([winning(scores, T).get(j, Fraction(0)) for T in combinations(range(n), N)])
        rest = [i for i in range(n) if i != j]
        above = mean([Fraction(max(scores[i] for i in T) >= s) for T in combinations(rest, N)])
        A.append(Fraction(1, n) - wins + tilt(N) / n * (Fraction(expert >= s) - above))
    return A


def posterior(rewards: Row, k: int) -> list[Fraction]:
    """D(m) (r - (m+1)/(n+1)) beside m other right ones, D(m) = C(n-1-m, k-1) / C(n, k)."""
    n, others = len(rewards), [int(sum(rewards) - r) for r in rewards]
    D = [Fraction(comb(n - 1 - m, k - 1), comb(n, k)) for m in others]
    return [d * (r - Fraction(m + 1, n + 1)) for d, m, r in zip(D, others, rewards)]


def exact(numbers):
    """The same numbers, or lists of them, as fractions."""
    return [*map(exact, numbers)] if isinstance(numbers, list) else Fraction(numbers)


def pairs_of(f: Callable, k: int, centred: bool = False) -> Callable:
    """(first, second row) -> advantages by all k-subsets of f, a function of (first, second) pairs."""
    return lambda first, second: subset_advantages(f, [*zip(first, second)], k, centred)


def cases() -> list[dict]:
    """What stands in the file."""
    found = []

    def add(function: str, expected: Callable, columns: dict[str, list], **options) -> None:
        result = [[float(a) for a in expected(*row)] for row in zip(*map(exact, columns.values()))]
        found.append({"function": function, "arguments": columns | options, "result": result})

    for rewards in ({"rewards": BINARY}, {"rewards": GRADED}):
        name = "pass_at_k_pg.advantages"
        add(name, rloo, rewards, k=3, estimator="mean")
        add(name, maxrl, rewards, k=3, estimator="maxrl")
        for k in (2, 3, 6):
            for estimator in ("unbiased", "biased"):
                centred = estimator == "biased"
                add(name, lambda r: subset_advantages(max, r, k, centred), rewards, k=k, estimator=estimator)
            add("recipes.all_right.all_right", lambda r: subset_advantages(min, r, k), rewards, k=k)
    for k in (2, 5):
        add("recipes.baselines.posterior", partial(posterior, k=k), {"rewards": BINARY}, k=k)
    votes = {"votes": VOTES, "rewards": CORRECT}
    add("majority_pg.advantages", lambda votes, rewards: rloo(rewards), votes, k=3, estimator="mean")
    for k in (2, 3, 6):
        for estimator in ("unbiased", "biased"):
            expected = pairs_of(majority_value, k, estimator == "biased")
            add("majority_pg.advantages", expected, votes, k=k, estimator=estimator)
    scored, reward_selects = {"rewards": GRADED, "scores": SCORES}, {"rewards": BINARY, "scores": BINARY}
    name = "bon_rl.advantages"
    for columns in (scored, reward_selects):
        add(name, lambda rewards, scores: rloo(rewards), columns, N=2, estimator="mean")
        for N in (2, 3, 6):
            selected = pairs_of(best_of_value, N)
            add(name, lambda rewards, scores: selected(scores, rewards), columns, N=N, estimator="exact")
        add(name, partial(variational, N=2), columns, N=2, estimator="variational")
    for estimator in ("rlb", "rlb-p", "rlb-all"):
        for N in (2, 4):
            add(name, lambda r, s: closed_form(r, N, estimator), reward_selects, N=N, estimator=estimator)
    for likelihood, scores, experts in (("variational", SCORES, [3, 0, 4.5]), ("exact", BINARY, [1, 0, 1, 1, 0])):
        for N in (2, 4):
            columns = {"expert_scores": experts, "scores": scores}
            expected = partial(sft, N=N, likelihood=likelihood)
            add("bon_sft.coefficients", expected, columns, N=N, likelihood=likelihood)
    return found


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in cases())
    FILE.write_text(f"[\n{lines}\n]\n")
    print(f"{FILE}: {len(cases())} cases")
