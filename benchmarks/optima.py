"""The best that any policy can do on `suspects`, exactly: what each objective tends to, before anything is run.

    python benchmarks/optima.py                 # the tables of these predictions
    python benchmarks/optima.py --predictions   # writes predictions.json beside this file

Everything is a function of q (P, 8) float64: q_y is the probability that candidate y of a prompt is the hidden answer,
0 behind the last. A policy pi (P, 8) float64 has pi_y on each candidate; what is missing to 1 is elsewhere, and wrong.
Tries are independent. Tang: arXiv 2503.19595; Chow: 2412.15287; MaxRL: 2602.02710.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import claims
import measure  # first: puts the repository on the path
import torch

from verifiers import Problem
from verifiers.suspects import LEVELS, best_policy, posterior, spread_problems

TRIES = (1, 2, 4, 8, 16, 32)
PREDICTIONS = Path(__file__).with_name("predictions.json")


@dataclass
class Args:
    predictions: bool = False  # write predictions.json instead of printing the tables


@functools.cache
def problems_of(held_out: bool = True) -> list[Problem]:
    """The held-out problems of the task, 50 a level and 48 at level 2, or as many training ones; all prompts differ."""
    return spread_problems("suspects", held_out)


def level_weights(problems: Sequence[Problem]) -> torch.Tensor:
    """The share of each problem in a mean over levels, in which all count alike: (P,) float64 that add up to 1."""
    levels = torch.tensor([problem.level for problem in problems])
    _, level, counts = levels.unique(return_inverse=True, return_counts=True)
    return 1 / counts[level].double() / len(counts)


@functools.cache
def held_out() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (P, 8), weights (P,) and levels (P,) of the held-out prompts."""
    q = posterior([problem.prompt for problem in problems_of()])
    return q, level_weights(problems_of()), (q > 0).sum(-1)


# --- metrics of a policy ----------------------------------------------------------------------------------------------
def pass_at_k(q: torch.Tensor, pi: torch.Tensor, k: int) -> torch.Tensor:
    """pass@k = sum_y q_y (1 - (1 - pi_y)^k): (P,)."""
    return (q * (1 - (1 - pi) ** k)).sum(-1)


@functools.cache
def vote_counts(k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All ways in which k votes fall on m candidates and elsewhere: the counts (C, m+1), elsewhere last; the logarithm
    of their multinomial coefficients (C,); each candidate's share of the win (C, m). C = binomial(k + m, m): 12 870 for
    k = m = 8, and more than memory holds for k = 32.
    """
    bars = torch.tensor(list(itertools.combinations(range(k + m), m)))  # (C, m): stars and bars
    edges = torch.cat([torch.full_like(bars[:, :1], -1), bars, torch.full_like(bars[:, :1], k + m)], 1)
    counts = (edges.diff(dim=-1) - 1).double()  # (C, m+1)
    top = counts[:, :m].amax(-1, keepdim=True)  # (C, 1)
    won = counts[:, :m] == top
    tied = won.sum(-1, keepdim=True) + (top == 1) * counts[:, m:]
    orders = math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(-1)
    return counts, orders, won / tied * (top > 0)  # where no candidate has a vote, none wins


def maj_at_k(q: torch.Tensor, pi: torch.Tensor, k: int) -> torch.Tensor:
    """maj@k: the expected reward of the most voted answer of k, ties split: (P,), by enumeration of all vote counts.

    Each response elsewhere is an answer of its own, which nobody else gives, and wrong. pi: (..., P, 8), and so is what
    is returned without its last dimension.
    """
    size, value = (q > 0).sum(-1), pi.new_zeros(pi.shape[:-1])
    for m in size.unique().tolist():
        some = size == m  # (P,)
        counts, orders, share = vote_counts(k, m)
        listed = pi[..., some, :m]  # (..., P', m)
        everywhere = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1).clamp(min=1e-300)  # (..., P', m+1)
        chance = (orders + everywhere.log() @ counts.T).exp()  # (..., P', C)
        value[..., some] = (chance * (q[some, :m] @ share.T)).sum(-1)
    return value


def best_of_n(q: torch.Tensor, pi: torch.Tensor, scores: torch.Tensor, N: int) -> torch.Tensor:
    """Best-of-N under a verifier's scores (P, 8): the expected reward of the sample that scores highest, (P,).

    Chow: a score level has mass F^N - F_-^N, and inside it pi_bon ~ pi: ties are split. Responses elsewhere
    score lowest of all.
    """
    elsewhere = 1 - pi.sum(-1, keepdim=True)  # (P, 1)
    below = elsewhere + (pi.unsqueeze(-2) * (scores.unsqueeze(-2) < scores.unsqueeze(-1))).sum(-1)  # (P, 8): F_-
    level = (pi.unsqueeze(-2) * (scores.unsqueeze(-2) == scores.unsqueeze(-1))).sum(-1)  # (P, 8): F - F_-
    pi_bon = pi * ((below + level) ** N - below**N) / level.clamp(min=1e-300)
    return (q * pi_bon).sum(-1)


def kl(pi: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(pi || base) in nats, (P,), with everything elsewhere taken as one response: a lower bound on the true one."""
    pi, base = (torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1) for p in (pi, base))  # (P, 9)
    return torch.special.xlogy(pi, pi / base.clamp(min=1e-300)).sum(-1)


def at_temperature(pi: torch.Tensor, temperature: float) -> torch.Tensor:
    """The policy ~ pi^(1/T), (P, 8), of one with nothing elsewhere. It is what sampling tokens at T does to a policy
    that leaves open one token of the name: the rest follows."""
    pi = pi ** (1 / temperature)
    return pi / pi.sum(-1, keepdim=True)


# --- what each objective tends to -------------------------------------------------------------------------------------
def uniform(q: torch.Tensor) -> torch.Tensor:
    """The policy that prefers none of the candidates, which `tiny` comes near at its warm start."""
    return (q > 0) / (q > 0).sum(-1, keepdim=True).double()


def maximiser(q: torch.Tensor, inverse: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The policy that maximises sum_y F_y(pi_y) under sum_y pi_y = 1, for concave F_y: (P, 8).

    inverse(mu): where the slope F'_y is the multiplier mu (P, 1), or the end of [0, 1] nearest to it, and 0 where q is:
    (P, 8). Its sum falls as mu grows: bisection of log mu.
    """
    low, high = torch.full_like(q[:, :1], -100.0), torch.full_like(q[:, :1], 100.0)  # (P, 1)
    for _ in range(60):
        log_mu = (low + high) / 2
        many = inverse(log_mu.exp()).sum(-1, keepdim=True) > 1
        low, high = torch.where(many, log_mu, low), torch.where(many, high, log_mu)
    # Where F is nearly straight the last bit of mu moves pi: the point between the two ends that adds up to 1.
    more, less = inverse(low.exp()), inverse(high.exp())
    share = (1 - less.sum(-1, keepdim=True)) / (more - less).sum(-1, keepdim=True).clamp(min=1e-300)  # (P, 1)
    pi = torch.lerp(less, more, share.clamp(0, 1)).where(q > 0, 0.0)
    return pi / pi.sum(-1, keepdim=True)


def where_steep(slope: Callable[[torch.Tensor], torch.Tensor], mu: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What `maximiser` asks for, by bisection of a slope (P, 8) that falls as pi_y grows and may be infinite at 0."""
    left, right = torch.zeros_like(q), torch.ones_like(q)  # (P, 8)
    for _ in range(55):
        pi = (left + right) / 2
        steep = slope(pi) > mu
        left, right = torch.where(steep, pi, left), torch.where(steep, right, pi)
    return pi


def bon_sft_policy(q: torch.Tensor, N: int) -> torch.Tensor:
    """Maximises the exact likelihood of Best-of-N with a 0/1 verifier, sum_y q_y log(1 - (1 - pi_y)^N): (P, 8).

    Chow, BoN-SFT on solutions drawn from q. Where y is right, the verifier fails p = 1 - pi_y of the samples, and
    log pi_bon(y) = log pi_y + log((1 - p^N) / (1 - p)) = log(1 - p^N). N = 1 is SFT: pi = q.
    """
    return maximiser(q, lambda mu: where_steep(lambda p: q * N * (1 - p) ** (N - 1) / (1 - (1 - p) ** N), mu, q))


def maxrl_policy(q: torch.Tensor, n: int) -> torch.Tensor:
    """Maximises sum_y q_y sum_{j<n} (1 - (1 - pi_y)^j) / j, the log-likelihood cut off at order n-1: (P, 8); n >= 3."""
    return maximiser(q, lambda mu: where_steep(lambda p: q * (1 - (1 - p) ** (n - 1)) / p, mu, q))


def frontier_policy(q: torch.Tensor, weight: float, k: int) -> torch.Tensor:
    """Maximises weight pass@1 + (1 - weight) pass@k, 0 <= weight <= 1: (P, 8). No policy has more of both.

    The slope q (weight + (1 - weight) k (1 - pi)^(k-1)) has an inverse in closed form."""

    def inverse(mu: torch.Tensor) -> torch.Tensor:
        missed = ((mu / q - weight) / ((1 - weight) * k)).nan_to_num(0).clamp(min=0) ** (1 / (k - 1))
        return (1 - missed).clamp(min=0)

    return maximiser(q, inverse)


def mean_kl_policy(q: torch.Tensor, beta: float, base: torch.Tensor) -> torch.Tensor:
    """Maximises mean reward - beta KL(pi || base): pi ~ base exp(q / beta), (P, 8)."""
    return (base.log() + q / beta).softmax(-1)


def majority_kl_policy(q: torch.Tensor, beta: float, base: torch.Tensor, k: int = 8) -> torch.Tensor:
    """Maximises maj@k - beta KL(pi || base): (P, 8), by ascent on the logits.

    It is not concave: the better of two ascents, from the base policy and from the optimum of the mean reward.
    """

    log_base = base.clamp(min=1e-300).log()

    def objective(logits: torch.Tensor) -> torch.Tensor:
        log_pi = logits.where(q > 0, -700.0).log_softmax(-1)
        pi = log_pi.exp()
        return maj_at_k(q, pi, k) - beta * (pi * (log_pi - log_base)).sum(-1)

    ends = []
    for start in (base, mean_kl_policy(q, beta, base)):
        logits = start.clamp(min=1e-300).log().requires_grad_()
        ascent = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            ascent.zero_grad()
            loss = -objective(logits).sum()
            loss.backward()
            return loss

        ascent.step(closure)
        ends.append(logits.detach())
    better = objective(ends[1]) > objective(ends[0])  # (P,)
    return torch.where(better.unsqueeze(-1), ends[1], ends[0]).where(q > 0, -torch.inf).softmax(-1)


def frontier(q: torch.Tensor, weights: torch.Tensor, k: int, points: int = 101) -> torch.Tensor:
    """(pass@1, pass@k) of the policies that no other beats in both, from the best for k tries to the best for one.

    weights: (P,) of the prompts. Returns (points, 2) float64. All prompts share one trade-off: it maximises the mean.
    """
    policies = [frontier_policy(q, weight, k) for weight in torch.linspace(0, 1, points, dtype=torch.float64).tolist()]
    return torch.stack([torch.stack([weights @ pass_at_k(q, pi, j) for j in (1, k)]) for pi in policies])


def mean_kl_policy_at(q: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, distance: float) -> torch.Tensor:
    """The policy (P, 8) with the highest mean reward among those whose mean KL to the base is `distance` nats."""
    low, high = -10.0, 10.0  # log beta; the KL falls with it
    for _ in range(60):
        pi = mean_kl_policy(q, math.exp((low + high) / 2), base)
        low, high = ((low + high) / 2, high) if weights @ kl(pi, base) > distance else (low, (low + high) / 2)
    return pi


class Predicted(claims.Source):
    """The optimum of the objective of each run. A claim's number is a limit: one optimum's score less another's, or the
    uniform base's."""

    OPTIMUM = {"base": "base", "sft": "sft", "bon-sft": "bon-sft-8", "maxrl": "maxrl-16",
               **dict.fromkeys(("mean", "hard-mean", "learned-exact", "learned-mean"), "k1"),
               **dict.fromkeys(("hard-k8", "k8-n8", "rlb-p", "variational"), "k8"),
               **{f"baseline-{name}": "k8" for name in ("b", "others", "posterior")},
               **{f"k{k}": f"k{k}" for k in (2, 4, 8, 16, 32)},
               **{f"k{k}-biased": f"k{k - 1}" for k in (2, 4, 8, 16)}}  # fmt: skip

    def __init__(self):
        self.q, self.weights, self.levels = held_out()
        self.policies = {  # what each objective tends to, (P, 8)
            "base": uniform(self.q),
            **{f"k{k}": best_policy(self.q, k) for k in (1, 2, 3, 4, 7, 8, 15, 16, 32)},
            "sft": self.q,
            **{f"bon-sft-{N}": bon_sft_policy(self.q, N) for N in (8, 16, 32)},
            "maxrl-16": maxrl_policy(self.q, 16),
        }

    def mean(self, values: torch.Tensor, levels: Sequence[int] = ()) -> float:
        """Of values (P,), over the prompts of these levels, or of all."""
        share = self.weights * torch.isin(self.levels, torch.tensor(levels or list(LEVELS)))  # (P,)
        return (share @ values / share.sum()).item()

    @functools.cache
    def policy(self, name: str) -> torch.Tensor:
        """(P, 8). Raises KeyError for a run that is not on this task."""
        if not name.startswith("vote"):
            return self.policies[self.OPTIMUM[name]]
        _, estimator, beta = name.split("-")
        if estimator == "mean":
            return mean_kl_policy(self.q, float(beta), self.policies["base"])
        return majority_kl_policy(self.q, float(beta), self.policies["base"], 7)  # biased, k = 8, ascends maj@7

    def at(self, name: str, metric: str, levels: Sequence[int] = (), where: str = "held-out") -> float:
        pi = self.policies["base"] if where == "before" else self.policy(name)
        pi = at_temperature(pi, float(where[4:])) if where.startswith("T") else pi
        kind, _, k = metric.partition("@")
        values = {
            "pass": lambda: pass_at_k(self.q, pi, int(k)),
            "maj": lambda: maj_at_k(self.q, pi, int(k)),
            "bon": lambda: best_of_n(self.q, pi, self.q, int(k)),  # the verifier's score is q itself
            "kl": lambda: kl(pi, self.policies["base"]),
        }[kind]
        return self.mean(values(), levels)

    def votes_at_equal_kl(self, beta: float) -> float:
        name = f"vote-biased-{beta}"
        at_kl = mean_kl_policy_at(self.q, self.weights, self.policies["base"], self.at(name, "kl"))
        return self.at(name, "maj@8") - self.mean(maj_at_k(self.q, at_kl, 8))


def predictions() -> dict:
    """What exact theory says of every claim over the held-out prompts, before any run; None where it says nothing."""
    source, rows = Predicted(), [(claim, "bandit, not this task", None) for claim in ("B1", "B2", "B3")]
    for claim, what, value in claims.claims():
        try:
            rows.append((claim, what, round(value(source), 4)))
        except KeyError:
            rows.append((claim, what, None))
    return {
        "policies": {
            name: {f"pass@{k}": round(source.mean(pass_at_k(source.q, pi, k)), 4) for k in TRIES}
            for name, pi in source.policies.items()
        },
        "claims": [dict(zip(("claim", "what", "predicted"), row)) for row in rows],
    }


def main(args: Args) -> None:
    found = predictions()
    if args.predictions:
        PREDICTIONS.write_text(measure.records_json(found))
        print(PREDICTIONS)
        return
    print("the optimum of each objective, over the held-out prompts\n")
    rows = [[name, *(f"{value:.3f}" for value in row.values())] for name, row in found["policies"].items()]
    measure.print_table(["", *(f"pass@{k}" for k in TRIES)], rows)
    print("what it says of each comparison of claims.py\n")
    measure.print_table(["claim", "comparison", "predicted"], [[*row.values()] for row in found["claims"]])


if __name__ == "__main__":
    measure.program(main, Args)
