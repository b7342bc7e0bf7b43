"""benchmarks/spectrum.py: what an estimator maximises, against autograd, enumeration and exact fractions."""

import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import pytest
import spectrum
import torch
from enumeration import BINARY, K, all_tuples, exact_gradient, expected_gradient
from runs import ROOT

import bon_rl
import pass_at_k_pg
from harness.report import number
from pass_at_k_pg import advantages
from verifiers import BadInput


def rule(right, wrong):
    """The rule that gives a right sample right[c] and a wrong one wrong[c] when c of its row are right."""
    right, wrong = (torch.tensor([float(x) for x in values], dtype=torch.float64) for values in (right, wrong))

    def advantages(rewards):
        count = rewards.sum(-1, keepdim=True).long()  # (B, 1)
        return torch.where(rewards == 1, right[count], wrong[count])  # (B, n)

    return advantages


def more_than(m):
    """(b, actions) -> 1 if more than m of them are right."""
    return lambda b, y: float(sum(BINARY[b, a].item() for a in y) > m)


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_is_that_of_the_objective_by_autograd(seed):
    """Two prompts that share parameters, all 4^4 draws: the expected gradient is the gradient of
    sum_m D(m) P(more than m) and of sum_j w_j pass@j. D and beta are those of a rule whose advantages are drawn."""
    n, draw = 4, torch.Generator().manual_seed(seed)
    right, wrong = torch.randint(-9, 10, (2, n + 1), generator=draw).tolist()
    advantages = rule(right, wrong)
    estimate = expected_gradient(lambda b, y: advantages(BINARY[b][y]), n)
    D = spectrum.worth(advantages, n)
    assert D.tolist() == [right[m + 1] - wrong[m] for m in range(n)]
    for m, beta in enumerate(spectrum.baseline(advantages, n).tolist()):
        assert math.isnan(beta) if D[m] == 0 else beta == pytest.approx(-wrong[m] / D[m].item())
    by_tails = sum(D[m] * exact_gradient(more_than(m), n) for m in range(n))
    by_passes = sum(float(w) * exact_gradient(more_than(0), j) for j, w in enumerate(spectrum.spectrum(D), 1))
    assert estimate.norm() > 0.1
    torch.testing.assert_close(estimate, by_tails, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate, by_passes, rtol=1e-10, atol=1e-11)


def test_utility_does_not_cancel_with_256_samples():
    n = 256
    D = [Fraction((-1) ** m * (m % 7), 3) + 2 for m in range(n)]
    for p in (Fraction(1, 1000), Fraction(1, 2), Fraction(99, 100)):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        exact = sum(d * sum(chance[m + 1 :]) for m, d in enumerate(D))
        assert spectrum.utility(D, float(p)).item() == pytest.approx(float(exact), rel=1e-10)
    all_right = spectrum.utility([0] * 255 + [1], torch.tensor([0.5, 0.25])).tolist()
    assert all_right == pytest.approx([2.0**-256, 2.0**-512], rel=1e-12)


def exact_grpo(n):
    """D of GRPO to 60 digits. With c of n right A = (r - c/n) / s / n, s^2 = c (n-c) / (n (n-1)); 0 if all agree."""
    with localcontext() as context:
        context.prec = 90

        def s(c):
            return (Decimal(c * (n - c)) / (n * (n - 1))).sqrt()

        right = [0, *((1 - Decimal(c) / n) / s(c) / n for c in range(1, n)), 0]
        wrong = [0, *(-(Decimal(c) / n) / s(c) / n for c in range(1, n)), 0]
        return [Fraction(right[m + 1] - wrong[m]) for m in range(n)]


RS_GRPO_MEAN = [1 + c * (math.e - 1) / 8 for c in range(9)]  # of e^r over 8 samples, c of them right
E = [[0] * i + [1] + [0] * (7 - i) for i in range(8)]
OF_PASS_AT_4 = [Fraction(x, 70) for x in (35, 20, 10, 4, 1, 0, 0, 0)]
TABLE = {  # row of docs/papers.md -> rules, their D at n = 8 and k = 4, and w where it is known by hand
    "REINFORCE, RLOO": ([spectrum.reinforce, partial(advantages, estimator="mean")], [Fraction(1, 8)] * 8, E[0]),
    "Dr. GRPO": ([spectrum.dr_grpo], [Fraction(7, 64)] * 8, [Fraction(7, 8), *E[0][1:]]),
    "GRPO": ([spectrum.grpo], exact_grpo(8), None),
    "RS-GRPO, β = 1": (
        [spectrum.rs_grpo], [(math.e / RS_GRPO_MEAN[m + 1] - 1 / RS_GRPO_MEAN[m]) / 8 for m in range(8)], None,
    ),
    "MaxRL": (
        [partial(advantages, estimator="maxrl")], [Fraction(7, 8), *(Fraction(1, m + 1) for m in range(1, 8))],
        [*(Fraction(1, j) for j in range(1, 8)), 0],
    ),
    "unbiased, k = 4": ([advantages, spectrum.leave_two_out], OF_PASS_AT_4, E[3]),
    "biased, k = 4": (
        [partial(advantages, estimator="biased")], [Fraction(x, 56) for x in (21, 15, 10, 6, 3, 1, 0, 0)], E[2],
    ),
    "pass^4": ([spectrum.all_right], OF_PASS_AT_4[::-1], [4, -6, 4, -1, 0, 0, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_worth_and_weights_by_hand_are_those_of_the_rules_and_of_the_page(name):
    rules, D, w = TABLE[name]
    for rule in rules:
        assert spectrum.worth(partial(rule, k=4), 8).tolist() == pytest.approx([float(d) for d in D], rel=1e-12)
    found = spectrum.spectrum(D)
    assert w in (None, found)
    cells = (" ".join(number(float(x)) for x in row) for row in (D, found))
    assert f"| {name} | {' | '.join(cells)} |" in (ROOT / "docs" / "papers.md").read_text()


@pytest.mark.parametrize("n", [8, 16, 20])
def test_the_printed_bound_covers_the_error_of_the_weights(n):
    D = spectrum.worth(partial(spectrum.grpo, k=1), n)
    errors = [abs(float(Fraction(x) - y)) for x, y in zip(spectrum.weights(D), spectrum.spectrum(exact_grpo(n)))]
    bounds = spectrum.error_bounds(D)
    assert all(error <= 4 * bound for error, bound in zip(errors, bounds)) and max(errors) > 0
    assert bounds[2] == pytest.approx(math.comb(n, 3) * 4 * 2.0**-52 * D.max().item(), rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_that_of_all_draws(seed):
    n, draw = 4, torch.Generator().manual_seed(seed)
    advantages = rule(*torch.randint(-9, 10, (2, n + 1), generator=draw).tolist())
    policy = torch.rand(K, dtype=torch.float64, generator=draw).softmax(0)
    is_right = torch.tensor([True, False, seed % 2 == 0, False])
    y = all_tuples(n)  # (K^n, n)
    scores = torch.eye(K, dtype=torch.float64)[y] - policy  # (K^n, n, K)
    g = (advantages(is_right[y].double()).unsqueeze(-1) * scores).sum(1)  # (K^n, K)
    chance = policy[y].prod(-1)  # (K^n,)
    mean = chance @ g
    expected = (chance @ (g - mean).square().sum(-1)).sqrt() / mean.norm()
    assert spectrum.noise(advantages, n, policy, is_right) == pytest.approx(expected.item(), rel=1e-10)


def test_noise_without_a_mean_is_infinite_and_needs_right_and_wrong():
    policy = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)  # its mean score is 0 but for rounding
    nothing = rule([1] * 5, [1] * 5)
    assert spectrum.noise(nothing, 4, policy, torch.tensor([True, False, False])) == math.inf
    for right in (True, False):
        with pytest.raises(BadInput, match="between 0 and 1"):
            spectrum.noise(nothing, 4, torch.full((10,), 0.1, dtype=torch.float64), torch.full((10,), right))


REFUSED = {
    "first of the best": (lambda r: (torch.arange(r.shape[-1]) == r.argmax(-1, keepdim=True)).double() * r,
                          "not symmetric in the samples, or .*: with 2 of 4 right, a right sample"),
    "whitening": (lambda r: (r - r.mean()) / (r.std() + 1e-6), "dependent on the other rows of the batch: .* alone"),
    "a scale of the batch": (lambda r: (r - r.mean(-1, keepdim=True)) / r.mean(), "dependent on the other rows"),
    "neighbours": (lambda r: r * (r * r.roll(1, -1)).sum(-1, keepdim=True), "not symmetric"),
    "one over std": (lambda r: r / r.std(-1, keepdim=True), "the advantages of .* are not finite"),
    "random": (lambda r: torch.rand_like(r), "random, or with a memory"),
    "a sum": (lambda r: r.sum(-1), r"advantages must have the shape of the rewards, \(16, 4\), not \(16,\)"),
    "groups": (lambda r: bon_rl.advantages(r, r, 2, "variational"), "not symmetric"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_lies_outside_of_the_condition_is_refused(name):
    function, message = REFUSED[name]
    n = 6 if name == "groups" else 4
    with pytest.raises(BadInput, match=f"refused: {message}"):
        spectrum.worth(function, n)
    if name not in ("random", "groups"):
        with pytest.raises(BadInput, match="refused"):  # where not all patterns are tried
            spectrum.worth(function, 12)


def test_a_worth_of_zero_has_no_baseline():
    """Beside two right samples all have 5, right or wrong: D is 0, and there is no baseline. Beside none all have 0.
    What is rounding of the advantages is no worth."""
    advantages = rule([0, 0, 3, 5, 1], [0, 2, 5, 0, 0])
    beta = spectrum.baseline(advantages, 4).tolist()
    assert spectrum.worth(advantages, 4).tolist() == [0, 1, 0, 1]
    assert math.isnan(beta[0]) and beta[1:] == [-2, math.inf, 0]
    noisy = rule([0, 1, 1, 1 + 1e-13, 1], [0, 0, 1, 1, 0])
    assert spectrum.worth(noisy, 4).tolist() == [1, 1, 0, 0]


NO_MIXTURE = "; no mixture of pass@j with positive weights"
MAXRL = partial(advantages, k=4, estimator="maxrl")
WORDS = {
    "the gradient of pass@16": partial(advantages, k=16),
    "weighs the first and the last success most": partial(spectrum.grpo, k=4),
    "the gradient of pass@4": partial(advantages, k=4),
    "7/8 of the gradient of pass@1": partial(spectrum.dr_grpo, k=4),
    "the gradient of pass^3, all of 3 tries right": partial(spectrum.all_right, k=3),
    "nothing: its expectation is 0": torch.zeros_like,
    "1 pass@1 + 1/2 pass@2 + 1/3 pass@3 + 1/4 pass@4 + ... + 1/7 pass@7, all weights positive": MAXRL,
    "weighs the first and the last success most" + NO_MIXTURE: partial(spectrum.grpo, k=4),
    "weighs the success number 4 most" + NO_MIXTURE: rule([0, *(1, 1, 1, 2, 1, 1, 1, 1)], [0] * 9),
    "punishes a success where m = 2, 3 of the others are right": rule([0, *(1, 1, -1, -2, 1, 1, 1, 1)], [0] * 9),
}


@pytest.mark.parametrize("words", WORDS)
def test_what_is_maximised_in_words(words):
    n = 64 if words in [*WORDS][:2] else 8  # of 64 samples there are no weights w_j: rounding would decide them
    assert spectrum.maximises(spectrum.worth(WORDS[words], n)) == words


MINE = """
def mine(rewards, k): return (rewards - rewards.mean(-1, keepdim=True)) / k
def whitened(rewards, k): return (rewards - rewards.mean()) / rewards.std()
def same(rewards, k): return 0 * rewards + 1
"""


@pytest.fixture
def told(run, tmp_path):
    """told(*flags, code=0) -> what the command prints, where mine.py is."""
    (tmp_path / "mine.py").write_text(MINE)
    return lambda *flags, code=0: run("benchmarks/spectrum.py", *flags, code=code)


def test_the_command_tells_one_rule(told):
    """A = (r - c/4) / 2 has D = 3/8, and A(wrong | m) = -m/8 = -3/8 m/3. A rule that gives 1 to all has no baseline."""
    flags = ("mine.py:mine", "--n", "4", "--k", "2")
    out = told(*flags).stdout
    assert "maximises: 3/2 of the gradient of pass@1" in out and "one right answer of mass p among five" in out
    found = json.loads(told(*flags, "--json").stdout)
    assert found["D"] == [0.375] * 4 and found["w"] == [pytest.approx(1.5), 0, 0, 0]
    assert found["beta"] == pytest.approx([m / 3 for m in range(4)])
    flags = ("mine.py:same", "--n", "3", "--k", "2")
    out = told(*flags).stdout
    assert "no baseline at m = 0, 1, 2" in out and "maximises: nothing" in out
    assert json.loads(told(*flags, "--json").stdout) == {"D": [0, 0, 0], "beta": [None] * 3, "w": [0, 0, 0]}
    # It does not tell weights that rounding decides.
    out = told("mine.py:mine", "--n", "40").stdout
    assert "weights of pass@j are not shown" in out and "U(p)" in out
    assert json.loads(told("mine.py:mine", "--n", "40", "--json").stdout)["w"] is None


def test_the_command_lists_the_estimators_of_this_repository_and_draws(told, tmp_path):
    out = told().stdout
    assert all(f"pass_at_k_pg {name}" in out for name in pass_at_k_pg.NAMES)
    assert "pass_at_k_pg unbiased\n    the gradient of pass@4\n" in out
    assert "majority_pg\n    refused: depends on the answers that are voted for" in out
    told("--figure", "x/spectrum.png")
    assert (tmp_path / "x/spectrum.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_one_line(told):
    of_batch, no_k = "refused: dependent on the other rows of the batch", "--k must lie in 1..n, not 9 with --n 8"
    given = {"mine.py:whitened": of_batch, "--json": "--json is for one estimator", "mine.py:mine --k 9": no_k}
    for flags, message in given.items():
        (line,) = told(*flags.split(), code=2).stderr.splitlines()
        assert line.startswith("error: ") and message in line
