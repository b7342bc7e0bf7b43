"""Exact gradients by enumeration: two prompts whose softmax policies share parameters, all sample tuples, float64.

The expectation of an estimator over all K^n tuples is held against autograd of the objective's exact value over all
K^k. One prompt, 0/1 rewards and a cosine would not see a wrong scale, a wrong baseline or a wrong tie."""

import itertools

import torch

K = 4  # actions, which stand for whole responses
PROMPTS = 2
torch.manual_seed(0)
FEATURES = torch.randn(PROMPTS, K, 3, dtype=torch.float64)  # log-odds of prompt b: FEATURES[b] @ theta
THETA = torch.randn(3, dtype=torch.float64, requires_grad=True)
GRADED = torch.tensor([[0.0, 0.5, 2.0, 0.5], [1.0, -1.0, 1.0, 0.25]], dtype=torch.float64)  # (PROMPTS, K), with ties
BINARY = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
ANSWERS = torch.tensor([[0, 1, 2, -1], [0, 1, 1, 2]])  # (PROMPTS, K): prompt 0 has an action without an answer


def log_policy() -> torch.Tensor:
    """(PROMPTS, K)"""
    return (FEATURES @ THETA).log_softmax(-1)


def all_tuples(n: int) -> torch.Tensor:
    """(K^n, n)"""
    return torch.tensor(list(itertools.product(range(K), repeat=n)))


def exact_gradient(f, k: int) -> torch.Tensor:
    """grad of mean over prompts b of E[f(b, y_1..y_k)]; f maps (b, list of k actions) to a float."""
    log_pi, total = log_policy(), 0.0
    tuples = all_tuples(k)
    for b in range(PROMPTS):
        value = torch.tensor([f(b, y) for y in tuples.tolist()], dtype=torch.float64)
        total = total + (log_pi[b][tuples].sum(-1).exp() * value).sum() / PROMPTS
    return torch.autograd.grad(total, THETA)[0]


def expected_gradient(advantages, n: int) -> torch.Tensor:
    """E[ mean over prompts of sum_i A_i grad log pi(y_i) ]; advantages maps (b, actions (R, n)) to (R, n)."""
    log_pi, total = log_policy(), 0.0
    tuples = all_tuples(n)
    for b in range(PROMPTS):
        log_p = log_pi[b][tuples]  # (R, n)
        A = advantages(b, tuples)
        total = total + (log_p.sum(-1).exp().detach() * (A * log_p).sum(-1)).sum() / PROMPTS
    return torch.autograd.grad(total, THETA)[0]


def subset_mean(f, samples: list, k: int) -> float:
    """Mean of f over all k-subsets of samples, by enumeration."""
    values = [f(list(subset)) for subset in itertools.combinations(samples, k)]
    return sum(values) / len(values)


def subset_advantages(f, samples: list, k: int, centred: bool = False) -> list[float]:
    """(k/n) mean over the k-subsets T with i of A_i(T) = f(T) - f(T without i), which `centred` lessens by their mean
    in T: the definition of what Lemma 1 becomes for n > k."""
    n, subsets = len(samples), list(itertools.combinations(range(len(samples)), k))
    total = [0] * n
    for T in subsets:
        A = {i: f([samples[j] for j in T]) - f([samples[j] for j in T if j != i]) for i in T}
        for i in T:
            total[i] += A[i] - centred * sum(A.values()) / k
    return [x / len(subsets) for x in total]  # (k/n) / C(n-1, k-1) = 1 / C(n, k)


def majority_value(pairs: list[tuple[int, float]]) -> float:
    """Reward of the most voted answer of (vote, reward) pairs: ties split, -1 casts no vote, no votes are worth 0."""
    by_answer: dict[int, list[float]] = {}
    for vote, reward in pairs:
        if vote >= 0:
            by_answer.setdefault(vote, []).append(reward)
    top = max(map(len, by_answer.values()), default=0)
    winners = [sum(rewards) / len(rewards) for rewards in by_answer.values() if len(rewards) == top]
    return sum(winners) / len(winners) if winners else 0


def best_of_value(pairs: list[tuple[float, float]]) -> float:
    """Mean reward of those (score, reward) pairs whose score is highest."""
    top = max(score for score, _ in pairs)
    winners = [reward for score, reward in pairs if score == top]
    return sum(winners) / len(winners)
