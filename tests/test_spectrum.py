"""benchmarks/spectrum.py: what an estimator maximises, against autograd, enumeration and exact fractions."""

import importlib
import itertools
import json
import math
import sys
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import pytest
import torch
from enumeration import BINARY, exact_gradient, expected_gradient
from runs import ROOT

import bon_rl
import pass_at_k_pg
from pass_at_k_pg import advantages
from verifiers import BadInput

sys.path.insert(0, str(ROOT / "benchmarks"))
spectrum, baselines = importlib.import_module("spectrum"), importlib.import_module("recipes.baselines")
P = torch.tensor(spectrum.RATES, dtype=torch.float64)


def rule(right, wrong):
    """The rule that gives a right sample right[c] and a wrong one wrong[c] when c of its row are right."""
    right, wrong = (torch.tensor([float(x) for x in values], dtype=torch.float64) for values in (right, wrong))

    def advantages(rewards):
        count = rewards.sum(-1, keepdim=True).long()  # (B, 1)
        return torch.where(rewards == 1, right[count], wrong[count])  # (B, n)

    return advantages


def random_rule(seed):
    """Integers from -9 to 9, and the n from 2 to 8 that they are for."""
    draw = torch.Generator().manual_seed(seed)
    n = 2 + seed % 7
    return n, *torch.randint(-9, 10, (2, n + 1), generator=draw).tolist()


def at_least(m, n):
    """(b, n actions) -> 1 if more than m of them are right."""
    return lambda b, y: float(sum(BINARY[b, a].item() for a in y) > m)


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_is_that_of_the_objective_by_autograd(seed):
    """Two prompts that share parameters, all 4^4 draws: against sum_m D(m) P(more than m) and sum_j w_j pass@j."""
    n, draw = 4, torch.Generator().manual_seed(seed)
    right, wrong = torch.randint(-9, 10, (2, n + 1), generator=draw).tolist()
    advantages = rule(right, wrong)
    estimate = expected_gradient(lambda b, y: advantages(BINARY[b][y]), n)
    D = spectrum.worth(advantages, n)
    by_tails = sum(D[m] * exact_gradient(at_least(m, n), n) for m in range(n))
    w = spectrum.spectrum(D)
    by_passes = sum(float(w[j - 1]) * exact_gradient(at_least(0, j), j) for j in range(1, n + 1))
    assert estimate.norm() > 0.1
    torch.testing.assert_close(estimate, by_tails, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate, by_passes, rtol=1e-10, atol=1e-11)


def test_200_random_rules_have_the_slope_of_their_utility():
    """In exact fractions, p = 2/7: a right sample's mean score is grad p / p, a wrong one's -grad p / (1-p)."""
    p = Fraction(2, 7)
    for seed in range(200):
        n, right, wrong = random_rule(seed)
        D = [right[m + 1] - wrong[m] for m in range(n)]
        assert spectrum.worth(rule(right, wrong), n).tolist() == D
        w = spectrum.spectrum([Fraction(d) for d in D])
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        slope = sum(x * (c * right[c] / p - (n - c) * wrong[c] / (1 - p)) for c, x in enumerate(chance))
        assert slope == sum(w[j - 1] * j * (1 - p) ** (j - 1) for j in range(1, n + 1))
        value = sum(w[j - 1] * (1 - (1 - p) ** j) for j in range(1, n + 1))
        assert value == sum(D[m] * sum(chance[m + 1 :]) for m in range(n))
        assert spectrum.utility(D, 2 / 7).item() == pytest.approx(float(value), rel=1e-12, abs=1e-12)
        beta, size = spectrum.baseline(rule(right, wrong), n), [right[m] for m in range(n + 1)]
        for m in range(n):
            assert beta[m] == -wrong[m] / D[m] if D[m] else math.isinf(beta[m]) if wrong[m] else math.isnan(beta[m])
            if D[m]:
                assert D[m] * (1 - beta[m].item()) == pytest.approx(size[m + 1])


def test_utility_does_not_cancel_with_256_samples():
    """Against exact fractions, to 1e-10 of the value."""
    n = 256
    D = [Fraction((-1) ** m * (m % 7), 3) + 2 for m in range(n)]
    for p in (Fraction(1, 1000), Fraction(1, 20), Fraction(1, 2), Fraction(99, 100)):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        tails = list(itertools.accumulate(reversed(chance)))[::-1]  # P(at least c)
        exact = float(sum(d * tail for d, tail in zip(D, tails[1:])))
        assert spectrum.utility(D, float(p)).item() == pytest.approx(exact, rel=1e-10)
    tails = spectrum.utility([0] * 255 + [1], torch.tensor([0.5, 0.25])).tolist()
    assert tails == pytest.approx([2.0**-256, 2.0**-512], rel=1e-12)  # all right


E = [[0] * i + [1] + [0] * (7 - i) for i in range(8)]
TABLE = {  # D and w at n = 8, by hand
    "REINFORCE": (spectrum.reinforce, [Fraction(1, 8)] * 8, E[0]),
    "RLOO": (partial(advantages, estimator="mean"), [Fraction(1, 8)] * 8, E[0]),
    "Dr. GRPO": (spectrum.dr_grpo, [Fraction(7, 64)] * 8, [Fraction(7, 8), *E[0][1:]]),
    "unbiased": (advantages, [Fraction(x, 70) for x in (35, 20, 10, 4, 1, 0, 0, 0)], E[3]),
    "biased": (partial(advantages, estimator="biased"), [Fraction(x, 56) for x in (21, 15, 10, 6, 3, 1, 0, 0)], E[2]),
    "b(5)": (spectrum.leave_two_out, [Fraction(x, 70) for x in (35, 20, 10, 4, 1, 0, 0, 0)], E[3]),
    "MaxRL": (
        partial(advantages, estimator="maxrl"), [Fraction(7, 8), *(Fraction(1, m + 1) for m in range(1, 8))],
        [*(Fraction(1, j) for j in range(1, 8)), 0],
    ),
    "pass^4": (spectrum.all_right, [Fraction(x, 70) for x in (0, 0, 0, 1, 4, 10, 20, 35)], [4, -6, 4, -1, 0, 0, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_worth_and_weights_of_rules_known_by_hand(name):
    function, D, w = TABLE[name]
    assert spectrum.worth(partial(function, k=4), 8).tolist() == pytest.approx([float(d) for d in D], rel=1e-12)
    assert spectrum.spectrum(D) == w and all(isinstance(x, Fraction) for x in spectrum.spectrum(D))


def test_grpo_by_hand():
    """A = (r - c/n) / s / n, s^2 = c (n-c) / (n (n-1)): at n = 8 and c = 1 s = sqrt(1/8), D(0) = 7/64 sqrt(8)."""
    D, beta = spectrum.worth(partial(spectrum.grpo, k=1), 8), spectrum.baseline(partial(spectrum.grpo, k=1), 8)
    assert [round(d, 3) for d in D.tolist()] == [0.309, 0.247, 0.218, 0.207, 0.207, 0.218, 0.247, 0.309]
    assert [round(b, 2) for b in beta.tolist()] == [0, 0.18, 0.31, 0.44, 0.56, 0.69, 0.82, 1]
    w = [round(x, 3) for x in spectrum.weights(D)]
    assert w == [2.475, -1.754, 1.926, -1.196, 0.602, -0.124, 0.035, 0]


def exact_grpo(n):
    """w of GRPO to 60 digits."""
    with localcontext() as context:
        context.prec = 90

        def s(c):
            return (Decimal(c * (n - c)) / (n * (n - 1))).sqrt()

        right = [0, *((1 - Decimal(c) / n) / s(c) / n for c in range(1, n)), 0]
        wrong = [0, *(-(Decimal(c) / n) / s(c) / n for c in range(1, n)), 0]
        return spectrum.spectrum([Fraction(right[m + 1] - wrong[m]) for m in range(n)])


@pytest.mark.parametrize("n", [8, 16, 20])
def test_the_printed_bound_covers_the_error_of_the_weights(n):
    D = spectrum.worth(partial(spectrum.grpo, k=1), n)
    errors = [abs(float(Fraction(x) - y)) for x, y in zip(spectrum.weights(D), exact_grpo(n))]
    bounds = spectrum.error_bounds(D)
    assert all(error <= 4 * bound for error, bound in zip(errors, bounds)) and max(errors) > 0
    assert bounds[2] == pytest.approx(math.comb(n, 3) * 4 * 2.0**-52 * D.max().item(), rel=1e-9, abs=0)


@pytest.mark.parametrize("n", [32, 48])
def test_weights_that_rounding_decides_are_not_told(n):
    D = spectrum.worth(partial(spectrum.grpo, k=1), n)
    assert spectrum.weights(D) is None and max(spectrum.error_bounds(D)) > spectrum.LARGEST_ERROR
    assert spectrum.maximises(D) == "weighs the first and the last success most"


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_that_of_all_draws(seed):
    n, K = 4, 4
    draw = torch.Generator().manual_seed(seed)
    right, wrong = torch.randint(-9, 10, (2, n + 1), generator=draw).tolist()
    policy = torch.rand(K, dtype=torch.float64, generator=draw).softmax(0)
    is_right = torch.tensor([True, False, seed % 2 == 0, False])
    y = torch.tensor(list(itertools.product(range(K), repeat=n)))  # (K^n, n)
    scores = torch.eye(K, dtype=torch.float64)[y] - policy  # (K^n, n, K)
    g = (rule(right, wrong)(is_right[y].double()).unsqueeze(-1) * scores).sum(1)  # (K^n, K)
    chance = policy[y].prod(-1)  # (K^n,)
    mean = chance @ g
    variance = chance @ (g - mean).square().sum(-1)
    expected = (variance.sqrt() / mean.norm()).item()
    assert spectrum.noise(rule(right, wrong), n, policy, is_right) == pytest.approx(expected, rel=1e-10)


def test_noise_in_the_two_regimes():
    """n = 8, k = 4, computed before by another program. Among a thousand equal answers a baseline helps; with one right
    answer in five none does, but for this one at p = .1."""
    many, one = reversed(spectrum.REGIMES.values())
    u, b, posterior = (partial(f, k=4) for f in (baselines.u, baselines.b, baselines.posterior))
    rows = {u: [11.8, 14.5, 20.7, 35.3, 96], b: [12.4, 14.2, 18.1, 26.1, 53], posterior: [12.3, 13.2, 17.3, 26.8, 63]}
    for estimator, expected in rows.items():
        seen = [spectrum.noise(estimator, 8, *many(p)) for p in spectrum.RATES]
        assert seen == pytest.approx(expected, abs=0.5, rel=0.004)
    assert spectrum.noise(u, 8, *one(0.1)) == pytest.approx(0.878, abs=5e-4)
    assert spectrum.noise(posterior, 8, *one(0.1)) == pytest.approx(0.865, abs=5e-4)


def test_noise_without_a_mean_is_infinite_and_needs_right_and_wrong():
    policy = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)  # its mean score is 0 but for rounding
    nothing = rule([1] * 5, [1] * 5)
    assert spectrum.noise(nothing, 4, policy, torch.tensor([True, False, False])) == math.inf
    for right in (True, False):
        with pytest.raises(BadInput, match="between 0 and 1"):
            spectrum.noise(nothing, 4, torch.full((10,), 0.1, dtype=torch.float64), torch.full((10,), right))


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED = {
    "first of the best": (lambda r: (torch.arange(r.shape[-1]) == r.argmax(-1, keepdim=True)).double() * r,
                          "not symmetric in the samples, or .*: with 2 of 4 right, a right sample"),
    "position": (lambda r: r * torch.arange(r.shape[-1]), "not symmetric"),
    "whitening": (lambda r: (r - r.mean()) / (r.std() + 1e-6), "dependent on the other rows of the batch: .* alone"),
    "a scale of the batch": (lambda r: (r - r.mean(-1, keepdim=True)) / r.mean(), "dependent on the other rows"),
    "the number of rows": (lambda r: (r - r.mean(-1, keepdim=True)) / len(r), "dependent on the other rows"),
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
    """Two of four right and one more or not: 5 for all; with none right 0 for all."""
    right, wrong = [0, 0, 3, 5, 1], [0, 2, 5, 0, 0]
    assert spectrum.worth(rule(right, wrong), 4).tolist() == [0, 1, 0, 1]
    beta = spectrum.baseline(rule(right, wrong), 4).tolist()
    assert math.isnan(beta[0]) and beta[1:] == [-2, math.inf, 0]


def test_rounding_of_the_advantages_is_no_worth():
    noisy = rule([0, 1, 1, 1 + 1e-13, 1], [0, 0, 1, 1, 0])
    assert spectrum.worth(noisy, 4).tolist() == [1, 1, 0, 0]


# --- in words, on the command line ------------------------------------------------------------------------------------

NO_MIXTURE = "; no mixture of pass@j with positive weights"
MAXRL = partial(advantages, k=4, estimator="maxrl")
WORDS = {
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
    assert spectrum.maximises(spectrum.worth(WORDS[words], 8)) == words


def test_pass_at_k_is_recognised_with_many_samples():
    assert spectrum.maximises(spectrum.worth(partial(advantages, k=16), 64)) == "the gradient of pass@16"


MINE = """
import torch
def mine(rewards, k):
    return (rewards - rewards.mean(-1, keepdim=True)) / k
def whitened(rewards, k):
    return (rewards - rewards.mean()) / rewards.std()
def flat(rewards, k):
    return rewards.sum(-1)
def same(rewards, k):
    return torch.ones_like(rewards)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_the_command_tells_one_rule(run, mine):
    result = run("benchmarks/spectrum.py", f"{mine}:mine", "--n", "4", "--k", "2")
    assert result.returncode == 0, result.stderr
    assert "maximises: 3/2 of the gradient of pass@1" in result.stdout  # A = (r - c/4) / 2: D = 3/8, four of them
    assert "one right answer of mass p among five" in result.stdout
    result = run("benchmarks/spectrum.py", f"{mine}:mine", "--n", "4", "--k", "2", "--json")
    # A(wrong | m) = -m/8 = -3/8 m/3
    assert json.loads(result.stdout) == {
        "D": [0.375] * 4, "beta": [pytest.approx(m / 3) for m in range(4)], "w": [pytest.approx(1.5), 0, 0, 0]
    }  # fmt: skip


def test_the_command_says_where_there_is_no_baseline_and_no_weight(run, mine):
    result = run("benchmarks/spectrum.py", f"{mine}:same", "--n", "3", "--k", "2")
    assert "no baseline at m = 0, 1, 2" in result.stdout and "maximises: nothing" in result.stdout
    result = run("benchmarks/spectrum.py", f"{mine}:same", "--n", "3", "--k", "2", "--json")
    assert json.loads(result.stdout) == {"D": [0, 0, 0], "beta": [None] * 3, "w": [0, 0, 0]}
    result = run("benchmarks/spectrum.py", f"{mine}:mine", "--n", "40")
    assert "weights of pass@j are not shown" in result.stdout and "U(p)" in result.stdout
    assert json.loads(run("benchmarks/spectrum.py", f"{mine}:mine", "--n", "40", "--json").stdout)["w"] is None


def test_help_begins_with_the_docstring_line_by_line(run):
    result = run("benchmarks/spectrum.py", "--help")
    assert result.returncode == 0 and result.stdout.startswith(spectrum.__doc__) and "--figure" in result.stdout


def test_the_command_lists_the_estimators_of_this_repository_and_draws(run, tmp_path):
    out = run("benchmarks/spectrum.py").stdout
    assert all(f"pass_at_k_pg {name}" in out for name in pass_at_k_pg.NAMES)
    assert "pass_at_k_pg unbiased\n    the gradient of pass@4\n" in out
    assert "majority_pg\n    refused: depends on the answers that are voted for" in out
    assert run("benchmarks/spectrum.py", "--figure", str(path := tmp_path / "x" / "spectrum.png")).returncode == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


BAD = [
    (["{mine}:whitened"], "refused: dependent on the other rows of the batch"),
    (["{mine}:flat"], "must return shape (256, 8), not (256,)"),
    (["{mine}:missing"], "has no function 'missing'; its functions: mine, whitened, flat, same"),
    (["nowhere.py:f"], "cannot read 'nowhere.py'"),
    (["{mine}"], "is not FILE:NAME"),
    (["{mine}:mine", "--k", "9"], "--k must lie in 1..n, not 9 with --n 8"),
    (["--n", "0"], "--k must lie in 1..n, not 0 with --n 0"),
    (["--json"], "--json is for one estimator"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_input_is_one_line(flags, message, run, mine):
    result = run("benchmarks/spectrum.py", *(flag.format(mine=mine) for flag in flags))
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
