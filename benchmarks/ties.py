"""Where the two papers meet: Best-of-N estimators of one gradient, their bias and variance, exactly, by enumeration.

With a 0/1 reward that is also the verifier, Best-of-N is pass@N, and BoN-RLB, BoN-RLB(P), its all-sample form (Chow)
and the leave-one-out estimator (Tang) have the same expectation where P_fail is known. One softmax policy over 4
actions, of which one is right, and its N samples; float64, all 4^N tuples; seconds.

    python benchmarks/ties.py
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
from bon_rl import advantages  # noqa: E402

K = 4
REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
ESTIMATORS = {"exact": "leave-one-out (Tang)", "rlb": "BoN-RLB", "rlb-p": "BoN-RLB(P)", "rlb-all": "all samples"}


def policy(p_fail: float) -> torch.Tensor:
    """Log-odds of a policy that is right with probability 1 - p_fail; a leaf that requires a gradient."""
    share = torch.tensor([1 - p_fail, p_fail / 2, p_fail / 3, p_fail / 6], dtype=torch.float64)
    return share.log().requires_grad_()


def moments(p_fail: float, N: int, estimator: str, known: bool) -> tuple[float, float]:
    """(|bias|, standard deviation) of one prompt's gradient estimate from N samples, both over the true length."""
    theta = policy(p_fail)
    pi = theta.softmax(-1).detach()
    y = torch.tensor(list(itertools.product(range(K), repeat=N)))  # (K^N, N)
    chance = pi[y].prod(-1)  # (K^N,)
    p = torch.full((len(y),), p_fail, dtype=torch.float64) if known else None
    A = advantages(REWARD[y], REWARD[y], N, estimator, p_fail=p if estimator.startswith("rlb") else None)  # (K^N, N)
    score = torch.eye(K, dtype=torch.float64)[y] - pi  # (K^N, N, K): grad log pi of a softmax
    estimate = (A.unsqueeze(-1) * score).sum(1)  # (K^N, K)
    (exact,) = torch.autograd.grad(1 - (1 - theta.softmax(-1)[0]) ** N, theta)
    mean = (chance.unsqueeze(-1) * estimate).sum(0)
    variance = (chance * (estimate - mean).square().sum(-1)).sum()
    return ((mean - exact).norm() / exact.norm()).item(), (variance.sqrt() / exact.norm()).item()


def cosine(N: int, seed: int) -> float:
    """Between the variational and the exact gradient of Best-of-N; random policy, scores and rewards of 5 actions."""
    generator = torch.Generator().manual_seed(seed)
    theta, scores, rewards = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    theta.requires_grad_()
    log_pi = theta.log_softmax(-1)
    pi = log_pi.exp()
    below = (scores.unsqueeze(-1) > scores).double() @ pi  # (5,): chance of a lower score
    bon = (below + pi) ** N - below**N
    (exact,) = torch.autograd.grad((bon * rewards).sum(), theta, retain_graph=True)
    beats = (scores.unsqueeze(-1) >= scores).double()
    h = log_pi + common.best_of_n_tilt(N) * beats @ (pi.detach() * log_pi)  # (5,)
    weight = (bon * (rewards - (bon * rewards).sum())).detach()
    (variational,) = torch.autograd.grad((weight * h).sum(), theta)
    return torch.nn.functional.cosine_similarity(exact, variational, dim=0).item()


def main() -> None:
    N, rates = 4, (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
    for known in (True, False):
        what = "P_fail known: bias 0" if known else "P_fail estimated from the N samples: bias, then"
        print(f"N = n = {N}, {what}; standard deviation, in lengths of the true gradient\n")
        print(f"| P_fail | {' | '.join(ESTIMATORS.values())} |\n|---|{'---|' * len(ESTIMATORS)}")
        for p in rates:
            cells = [moments(p, N, name, known) for name in ESTIMATORS]
            print(f"| {p} | {' | '.join(f'{s:.2f}' if known else f'{b:.2f}, {s:.2f}' for b, s in cells)} |")
        print()
    print(
        "cosine of the variational gradient with the exact one: median and lowest tenth of 500 policies over 5 actions"
    )
    for N in (1, 2, 4, 8, 16, 32):
        values = torch.tensor([cosine(N, seed) for seed in range(500)])
        print(f"N = {N:2}: {values.median().item():.3f}, {values.quantile(0.1).item():.3f}")


if __name__ == "__main__":
    main()
