"""What an estimator maximises where rewards are 0 or 1 and it sees only who is right: exactly, from its advantages.

    python benchmarks/spectrum.py                                        # this repository's estimators, and others
    python benchmarks/spectrum.py my_file.py:my_advantages --n 8 --k 2   # (rewards (B, n), k) -> (B, n); also --json
    python benchmarks/spectrum.py --figure .github/spectrum.png

The n samples of a prompt are i.i.d. from the policy that is differentiated, with solve rate p, and a sample's advantage
depends on nothing but its own reward and the number of right samples. Let

    D(m) = A(right | m of the others are right) - A(wrong | m of the others are right),     m = 0 .. n-1

be what success is worth when m of the others succeed. Then, for every n and every baseline,

    E[ sum_i A_i grad log pi(y_i) ] = grad U(p),     U(p) = sum_m D(m) P(more than m of n tries are right)           (1)

because a right sample's mean score is grad p / p, a wrong one's -grad p / (1 - p), and the derivative of
P(more than m of n) is n Binom(m; n-1, p). D is the answer: the n tails are independent, and no other weights of
"at least one right", "at least two right", ... give this gradient. Read in pass@j the same objective is

    U = sum_j w_j pass@j,     w_j = C(n, j) sum_{i<j} (-1)^(j-1-i) C(j-1, i) D(n-1-i)                                (2)

where a weight may be negative. With beta(m) = -A(wrong | m) / D(m) an advantage is A_i = D(m) (r_i - beta(m)): D says
what is maximised, and beta, the baseline, how noisy the estimate is. Clipping, length normalisation, KL in the reward,
filtering and off-policy samples lie outside of this. A rule that sees more than who is right is refused.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import measure  # first: puts the repository on the path
import torch
import tyro

import bon_rl
import pass_at_k_pg
from harness.load_file import load_estimator
from harness.report import pyplot, save_and_close
from recipes.all_right import all_right
from recipes.baselines import b as leave_two_out
from recipes.published import dr_grpo, grpo, reinforce, rs_grpo
from verifiers import BadInput

Advantages = Callable[[torch.Tensor], torch.Tensor]  # (B, n) -> (B, n)
LARGEST_ERROR = 1e-6  # of a weight w_j that is printed
EPS = torch.finfo(torch.float64).eps


@dataclass
class Args:
    estimator: tyro.conf.Positional[str | None] = None  # FILE:NAME, (rewards (B, n), k) -> (B, n); default: many others
    n: int = 8  # samples of a prompt
    k: int | None = None  # what the estimator is given as k (default: 4, or n if that is less)
    json: bool = False  # print {"D": [...], "beta": [...], "w": [...]} and no more; w is null where it is too inexact
    figure: Path | None = None  # draw D, beta and U of six rules to this file


def numbers(values: torch.Tensor | Sequence[float], form: str = ".3g") -> str:
    return " ".join("-" if math.isnan(x) else f"{x:{form}}" for x in values)


def patterns(n: int) -> torch.Tensor:
    """Rows of 0/1 rewards (R, n) float64: all of them up to n = 10, else each number of right ones in four orders."""
    if n <= 10:
        return (torch.arange(2**n).unsqueeze(-1) >> torch.arange(n) & 1).double()  # (2^n, n)
    sorted_rows = torch.ones(n + 1, n, dtype=torch.float64).tril(-1)  # (n+1, n): the first c are right
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(n, generator=generator) for _ in range(2)]
    return torch.cat([sorted_rows, sorted_rows.flip(-1), *(sorted_rows[:, order] for order in orders)])


def by_count(advantages: Advantages, n: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A of a right sample and of a wrong one when c of the n are right, c = 0..n: (n+1,) float64 each, nan where there
    is no such sample; and below what a number is taken for rounding: 1e-12 of the largest |A| in float64.

    Raises BadInput where the advantages depend on more than a sample's own reward and the number of right ones."""
    if n < 1:
        raise BadInput(f"n must be at least 1, not {n}")
    rows = patterns(n)  # (R, n)
    A = advantages(rows.clone())
    if not isinstance(A, torch.Tensor) or A.shape != rows.shape:
        shape = tuple(A.shape) if isinstance(A, torch.Tensor) else type(A).__name__
        raise BadInput(f"refused: advantages must have the shape of the rewards, {tuple(rows.shape)}, not {shape}")
    share = 1e-12 if A.dtype == torch.float64 else 32 * torch.finfo(A.dtype).eps
    A, again = A.detach().double(), advantages(rows.clone()).detach().double()
    rounding = share * A.abs().max().item()

    def equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs() <= 100 * rounding  # nan is equal to nothing

    for row in (~A.isfinite()).nonzero()[:1, 0].tolist():
        raise BadInput(f"refused: the advantages of {numbers(rows[row], 'g')} are not finite")
    if not equal(A, again).all():
        raise BadInput("refused: random, or with a memory: two calls with the same rewards gave different advantages")
    count = rows.sum(-1).long()  # (R,)
    right, wrong = (torch.full((n + 1,), torch.nan, dtype=torch.float64) for _ in range(2))
    for c in range(n):
        right[c + 1] = A[(count == c + 1).unsqueeze(-1) & (rows == 1)][0]
        wrong[c] = A[(count == c).unsqueeze(-1) & (rows == 0)][0]
    usual = torch.where(rows == 1, right[count].unsqueeze(-1), wrong[count].unsqueeze(-1))  # (R, n)
    for b, i in (~equal(A, usual)).nonzero()[:1].tolist():
        what = "not symmetric in the samples, or dependent on more than own reward and the number right"
        seen = f"{A[b, i]:.4g} in {numbers(rows[b], 'g')}, {usual[b, i]:.4g} elsewhere"
        kind = ("wrong", "right")[int(rows[b, i])]
        raise BadInput(f"refused: {what}: with {count[b]} of {n} right, a {kind} sample has {seen}")
    for c in sorted(range(n + 1), key=lambda c: abs(c - n / 2)):  # mixed rows first: the others may be 0/0 when alone
        b = (count == c).nonzero()[-1, 0]
        alone = advantages(rows[b].unsqueeze(0).clone()).detach().double().squeeze(0)  # (1, n) -> (n,)
        if not equal(alone, usual[b]).all():
            seen = (
                f"{numbers(rows[b], 'g')} alone has the advantages {numbers(alone)}; among others {numbers(usual[b])}"
            )
            raise BadInput(f"refused: dependent on the other rows of the batch: {seen}")
    return right, wrong, rounding


def precision(advantages: Advantages, n: int) -> float:
    """The rounding of the type that the advantages come in: 2e-16 for float64."""
    return torch.finfo(advantages(torch.zeros(1, n, dtype=torch.float64)).dtype).eps


def worth(advantages: Advantages, n: int) -> torch.Tensor:
    """D(m), what success is worth when m = 0..n-1 of the others succeed: (n,) float64, 0 where it is rounding.

    advantages: (B, n) float64 rewards -> (B, n). Raises BadInput for a rule that is not of this kind, with what broke.
    """
    right, wrong, rounding = by_count(advantages, n)
    D = right[1:] - wrong[:-1]
    return D.masked_fill(D.abs() <= rounding, 0)


def baseline(advantages: Advantages, n: int) -> torch.Tensor:
    """beta(m) = -A(wrong | m) / D(m), m = 0..n-1, of A_i = D(m) (r_i - beta(m)): (n,) float64. Where D(m) = 0 it is nan
    if the advantages are 0, and inf if they are not: every sample has the same A, and there is no beta.

    Raises BadInput as `worth` does."""
    D, (_, wrong, rounding) = worth(advantages, n), by_count(advantages, n)
    without = torch.where(wrong[:-1].abs() > rounding, torch.inf, torch.nan).double()
    return torch.where(D == 0, without, -wrong[:-1] / D)


def binomial(n: int, p: torch.Tensor) -> torch.Tensor:
    """P(c of n tries are right), c = 0..n: p (...) -> (..., n+1) float64. Only positive numbers are added."""
    p = torch.as_tensor(p, dtype=torch.float64).unsqueeze(-1)  # (..., 1)
    mass = torch.ones_like(p)
    for _ in range(n):
        mass = torch.cat([mass * (1 - p), 0 * p], -1) + torch.cat([0 * p, mass * p], -1)
    return mass


def utility(D: Sequence, p: torch.Tensor) -> torch.Tensor:
    """U(p) = sum_m D(m) P(more than m of n tries are right), equation (1): p (...) in [0, 1] -> (...) float64.

    D: n numbers. The tails are sums of positive terms: they do not cancel, whatever n."""
    D = torch.as_tensor([float(d) for d in D], dtype=torch.float64)
    tails = binomial(len(D), p).flip(-1).cumsum(-1).flip(-1)[..., 1:]  # (..., n): P(more than 0), ..., P(more than n-1)
    return tails @ D


def spectrum(D: Sequence) -> list[Fraction]:
    """w_1 .. w_n of equation (2), exactly: D are n integers, fractions, or floats, which are taken at their value."""
    n, D = len(D), [Fraction(d) for d in (D.tolist() if isinstance(D, torch.Tensor) else D)]
    comb = math.comb
    return [
        comb(n, j) * sum((-1) ** (j - 1 - i) * comb(j - 1, i) * D[n - 1 - i] for i in range(j)) for j in range(1, n + 1)
    ]


def error_bounds(D: Sequence, eps: float = EPS) -> list[float]:
    """How far each w_j is off where each D(m) is off by eps max |D| at most: C(n, j) 2^(j-1) eps max |D|, j = 1..n."""
    n, largest = len(D), max(abs(float(d)) for d in D)
    return [math.comb(n, j) * 2.0 ** (j - 1) * eps * largest for j in range(1, n + 1)]


def weights(D: torch.Tensor, eps: float = EPS, limit: float = LARGEST_ERROR) -> list | None:
    """w_1 .. w_n as floats, or None where rounding of D could change one by more than `limit`."""
    return [float(w) for w in spectrum(D)] if max(error_bounds(D, eps)) <= limit else None


def worth_of_pass_at(n: int, j: int, every: bool = False) -> list[Fraction]:
    """D of an estimator of grad pass@j from n samples, (j/n) C(n-1-m, j-1) / C(n-1, j-1); every: of pass^j, all of j
    tries right, which is the same read backwards."""
    D = [Fraction(j, n) * Fraction(math.comb(n - 1 - m, j - 1), math.comb(n - 1, j - 1)) for m in range(n)]
    return D[::-1] if every else D


def noise(advantages: Advantages, n: int, policy: torch.Tensor, right: torch.Tensor) -> float:
    """Standard deviation of g = sum_i A_i S_i (the root of its covariance's trace) over the length of its mean.

    policy: (K,) probabilities of a softmax over K responses, up to a factor; S_i = grad log pi(y_i) in its K logits,
    the unit vector of y_i less pi. right: (K,) bool. Exact: given c right samples all are independent within their
    class, and

        E[ |g|^2 | c ] = c a^2 E|S_right|^2 + (n-c) b^2 E|S_wrong|^2 + |c a mu_right + (n-c) b mu_wrong|^2
                         - c a^2 |mu_right|^2 - (n-c) b^2 |mu_wrong|^2

    with a, b the advantages of a right and of a wrong sample and mu the mean scores; c is binomial. inf where the mean
    is 0. Raises BadInput as `worth` does, and unless there are right and wrong responses."""
    policy, right = policy.double() / policy.double().sum(), right.bool()
    if not (policy[right].sum() > 0 and policy[~right].sum() > 0):
        raise BadInput("noise needs a policy that is right with a chance between 0 and 1")
    a, b, _ = by_count(advantages, n)
    c = torch.arange(n + 1, dtype=torch.float64)
    pulls, second = torch.zeros(n + 1, len(policy)).double(), torch.zeros(n + 1).double()
    for A, count, some in ((a, c, right), (b, n - c, ~right)):
        A = A.nan_to_num(0)  # (n+1,): where there is no such sample
        share = torch.where(some, policy, 0) / policy[some].sum()  # (K,)
        mu, square = share - policy, share @ (1 - 2 * policy + policy.square().sum())  # (K,), scalar
        pulls += (count * A).unsqueeze(-1) * mu  # (n+1, K)
        second += count * A**2 * (square - mu.square().sum())
    second += pulls.square().sum(-1)
    mass = binomial(n, policy[right].sum())  # (n+1,)
    mean = mass @ pulls  # (K,)
    variance = (mass @ second - mean.square().sum()).clamp(min=0)
    return (variance.sqrt() / mean.norm()).item() if mean.norm() > 1e-12 * second.max().sqrt() else math.inf


REGIMES = {  # solve rate p -> policy and right, as `noise` takes them
    "one right answer of mass p among five": lambda p: (torch.tensor([p, *[(1 - p) / 4] * 4]), torch.arange(5) < 1),
    "a thousand equal answers, 1000 p right": lambda p: (torch.ones(1000), torch.arange(1000) < round(1000 * p)),
}
RATES = (0.05, 0.2, 0.4, 0.6, 0.8)


def as_text(x: float, tolerance: float = 1e-9) -> str:
    """A number as a fraction of small denominator if it is one, else with three digits."""
    near = Fraction(x).limit_denominator(1000 if tolerance < 1e-6 else 30)
    return str(near) if abs(near - x) <= tolerance * abs(x) else f"{x:.3g}"


def maximises(D: torch.Tensor, eps: float = EPS, limit: float = LARGEST_ERROR) -> str:
    """What an estimator of worth D, (n,), maximises, in words. eps, limit: as in `weights`."""
    n, size, w, tolerance = len(D), D.abs().max().item(), weights(D, eps, limit), max(1e-9, 100 * eps)
    if size == 0:
        return "nothing: its expectation is 0"
    for every in (False, True):
        for j in range(1, n + 1):
            pure = torch.tensor([float(x) for x in worth_of_pass_at(n, j, every)], dtype=torch.float64)
            scale = (D @ pure / (pure @ pure)).item()
            if (D - scale * pure).abs().max() <= 10 * tolerance * size:
                factor = as_text(scale, tolerance)
                name = f"pass^{j}, all of {j} tries right" if every else f"pass@{j}"
                return f"the gradient of {name}" if factor == "1" else f"{factor} of the gradient of {name}"
    pairs = list(zip(w or [], error_bounds(D, eps)))
    if w and all(x >= -bound for x, bound in pairs):
        parts = [f"{as_text(x, tolerance)} pass@{j}" for j, (x, bound) in enumerate(pairs, start=1) if x > bound]
        return f"{' + '.join([*parts[:4], '...', parts[-1]] if len(parts) > 5 else parts)}, all weights positive"
    if (D < 0).any():
        where = ", ".join(map(str, (D < 0).nonzero().squeeze(-1).tolist()))
        return f"punishes a success where m = {where} of the others are right"
    top = [m for m in range(n) if D[m] >= (1 - 1e-6) * size]
    names = {0: "first", n - 1: "last"}
    peaks = " and the ".join(names.get(m, f"success number {m + 1}") for m in top)
    success = " success" if set(top) <= {0, n - 1} else ""
    mixture = "" if w is None else "; no mixture of pass@j with positive weights"
    return f"weighs the {peaks}{success} most{mixture}"


OTHERS = {
    "REINFORCE, r/n": reinforce, "Dr. GRPO": dr_grpo, "GRPO, without epsilon": grpo, "RS-GRPO, beta = 1": rs_grpo,
    "leave-two-out, b(k+1)": leave_two_out, "pass^k": all_right,
}  # fmt: skip


def own_estimators(n: int, k: int) -> dict[str, Advantages | str]:
    """The estimators of this repository by name, as (B, n) -> (B, n), or why they are refused."""
    rules = {f"pass_at_k_pg {x}": partial(pass_at_k_pg.advantages, k=k, estimator=x) for x in pass_at_k_pg.NAMES}
    for x in get_args(get_type_hints(bon_rl.Args)["estimator"]):
        rules[f"bon_rl {x}, the reward selects"] = lambda r, x=x: bon_rl.advantages(r, r, k, x)
    rules["bon_rl, a learned verifier selects"] = "depends on the verifier's scores"
    rules["majority_pg"] = "depends on the answers that are voted for"
    rules["bon_sft"] = "an expert's likelihood, not a reward"
    return rules | {name: partial(rule, k=k) for name, rule in OTHERS.items()}


def print_own(n: int, k: int) -> None:
    """Of each estimator: what it maximises, D, w."""
    print(f"n = {n} samples, k = {k}\n")
    for name, rule in own_estimators(n, k).items():
        try:
            if isinstance(rule, str):
                raise BadInput(rule)
            D = worth(rule, n)
            w = [0.0 if abs(x) <= bound else x for x, bound in zip(weights(D) or [], error_bounds(D))]
            print(f"{name}\n    {maximises(D)}\n    D  {numbers(D)}" + f"\n    w  {numbers(w)}" * bool(w))
        except ValueError as error:
            print(f"{name}\n    refused: {str(error).removeprefix('refused: ')}")


def print_one(advantages: Advantages, n: int) -> None:
    """D, beta and w of one rule, what it maximises, and its noise."""
    D, beta, eps = worth(advantages, n), baseline(advantages, n), precision(advantages, n)
    w, bounds = weights(D, eps), error_bounds(D, eps)
    columns = {
        "m right among the others": range(n), "D(m)": [f"{x:.6g}" for x in D],
        "beta(m)": ["-" if math.isnan(x) else "none" if math.isinf(x) else f"{x + 0:.6g}" for x in beta],
    }  # fmt: skip
    if w:
        columns |= {"j": range(1, n + 1), "w of pass@j": [f"{x:.6f}" for x in w]}
        columns["off by at most"] = [f"{x:.0e}" for x in bounds]
    measure.print_table([*columns], [*zip(*columns.values())])
    if none := beta.isinf().nonzero().squeeze(-1).tolist():
        where = ", ".join(map(str, none))
        print(f"There is no baseline at m = {where}: D is 0 there although the advantages are not.\n")
    if not w:
        print(f"The weights of pass@j are not shown: rounding of D moves one by up to {max(bounds):.0e} at n = {n}.")
        print("D and U hold at any n.\n")
    print(f"maximises: {maximises(D, eps)}\n")
    rows = [["U(p)", *(f"{u:.6g}" for u in utility(D, torch.tensor(RATES, dtype=torch.float64)))]]
    for name, regime in REGIMES.items():
        rows.append([f"noise, {name}", *(f"{noise(advantages, n, *regime(p)):.3g}" for p in RATES)])
    measure.print_table(["U; noise: standard deviation / length of the mean", *(f"p = {p:g}" for p in RATES)], rows)


def save_figure(path: Path, n: int, k: int) -> None:
    """Three panels: D and beta over m, U over p, of six rules; "biased" is that estimator of pass@k."""
    rules = {
        ("mean", "mean (RLOO)"): partial(pass_at_k_pg.advantages, k=k, estimator="mean"),
        ("GRPO", "GRPO"): partial(grpo, k=k),
        ("MaxRL", "MaxRL"): partial(pass_at_k_pg.advantages, k=k, estimator="maxrl"),
        ("unbiased", f"pass@{k}"): partial(pass_at_k_pg.advantages, k=k),
        ("biased", "biased"): partial(pass_at_k_pg.advantages, k=k, estimator="biased"),
        ("pass^k", f"pass^{k}"): partial(all_right, k=k),
    }
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    m, p, found = torch.arange(n), torch.linspace(0, 1, 201, dtype=torch.float64), ([], [], [])
    axes[1].plot(m, m / (n - 1), color="black", linewidth=0.6, zorder=9)
    axes[1].annotate("thin: m / (n - 1)", (0.3, 0.93), fontsize=9)
    for (family, name), rule in rules.items():
        D, U, colour = worth(rule, n), utility(worth(rule, n), p), measure.COLOURS[family]
        curves = ((m, D, "o-"), (m, baseline(rule, n), "o-"), (p, U / U[-1], "-"))
        for labels, axis, (x, y, line), share in zip(found, axes, curves, (0, 0.6, 0.4)):
            axis.plot(x, y, line, color=colour, markersize=3)
            known = y.isfinite().nonzero().squeeze(-1)
            labels += [((x[at], y[at]), name, colour) for at in known[int(share * len(known)) :][:1]]
    axes[0].set(title=f"what a right answer is worth\nwhen m of the other {n - 1} are right", xlabel="m", ylabel="D(m)")
    axes[1].set(title="how many were expected to be right", xlabel="m", ylabel="beta(m)")
    axes[2].set(title="what is maximised (1 at p = 1)", xlabel="p, the chance that a try is right", ylabel="U(p)")
    figure.canvas.draw()  # the layout stands from here on
    for axis, labels in zip(axes, found):
        measure.label(axis, labels)
    save_and_close(figure, path)


def main(args: Args) -> None:
    k = min(4, args.n) if args.k is None else args.k
    if not 1 <= k <= args.n:
        raise BadInput(f"--k must lie in 1..n, not {k} with --n {args.n}")
    if args.figure:
        save_figure(args.figure, args.n, k)
        print(args.figure)
    elif args.estimator is None:
        if args.json:
            raise BadInput("--json is for one estimator: name it, as FILE:NAME")
        print_own(args.n, k)
    else:
        rule = partial(load_estimator(args.estimator)[0], k=k)
        if args.json:
            D, beta, eps = worth(rule, args.n), baseline(rule, args.n), precision(rule, args.n)
            beta = [x if math.isfinite(x) else None for x in beta.tolist()]
            print(json.dumps({"D": D.tolist(), "beta": beta, "w": weights(D, eps)}))
        else:
            print_one(rule, args.n)


if __name__ == "__main__":
    measure.program(main, Args)
