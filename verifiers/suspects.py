"""`suspects`: an underspecified task, whose best policies are known exactly.

One of the people listed did it. The prompt lists 2 to 8 of 16 names in random order, "Eve Tom Ann:"; how many is its
level. The response is one name, "Tom". Who did it stays hidden, as tests do in programming: one try and many tries ask
for different policies. The prompt has every candidate: only the choice is left to learn.

`suspects`: the i-th of NAMES has the weight .7^i, i = 0..15. `tiny` is warm-started on prompts with all their
candidates: it then names each listed one equally often. `suspects_uniform`: all are equally likely. A fifth of all sets
of names is held out, in any order.
"""

import random
import zlib
from bisect import bisect
from collections.abc import Sequence
from functools import cache, partial
from itertools import accumulate, combinations

import torch

from . import Problem, Task, arithmetic

NAMES = "Tom Eve Sam Zoe Ben Kim Max Ann Joe Sue Ian Roy Leo Dan Jim Ray".split()
PRIOR = {  # not normalised
    "suspects": {name: 0.7**i for i, name in enumerate(NAMES)},
    "suspects_uniform": dict.fromkeys(NAMES, 1.0),
}
LEVELS = range(2, 9)  # names in the prompt
MOST = LEVELS[-1]
TRAIN_PER_LEVEL = 4_000
TEST_PER_LEVEL = 50
INSTRUCTION = "One of these people did it. Name the one you suspect: answer with the name alone."


def is_held_out(names: Sequence[str]) -> bool:
    """Whether this set of names, in any order, belongs to the test set: a fixed fifth of all sets."""
    return zlib.crc32(" ".join(sorted(names)).encode()) % 5 == 0


def listed(prompt: str) -> list[str]:
    """The names in a prompt of this task, in its order: "Eve Tom Ann:" has Eve, Tom and Ann."""
    return prompt[:-1].split()


def in_words(prompt: str) -> str:
    """What a pretrained model without a chat template reads: "Choose one of Eve, Tom, Ann: I choose"."""
    return f"Choose one of {', '.join(listed(prompt))}: I choose"


def suspect(response: str) -> str | None:
    """The name that is the response, spaces around it aside, or None. It may be one that is not listed."""
    name = response.strip()
    return name if name in NAMES else None


def posterior(prompts: Sequence[str], name: str = "suspects") -> torch.Tensor:
    """q_y = P(answer = y | prompt), its weight over the sum of the `listed` ones; then zeros: (P, 8) float64."""
    q = torch.zeros(len(prompts), MOST, dtype=torch.float64)
    for row, prompt in zip(q, prompts):
        weights = torch.tensor([PRIOR[name][y] for y in listed(prompt)], dtype=torch.float64)
        row[: len(weights)] = weights / weights.sum()
    return q


def best_policy(q: torch.Tensor, k: int) -> torch.Tensor:
    """The policy with the highest pass@k where candidate y is right with probability q_y: (P, 8) float64.

    q: (P, 8) float64, zeros allowed; its rows and those returned add up to 1. k = 1: the likeliest candidate (equal
    shares of a tie). k >= 2: the stationary point of sum_y q_y (1 - (1 - pi_y)^k) under sum_y pi_y = 1,

        pi_y = max(0, 1 - t w_y),    w_y = q_y^(-1/(k-1)),    t = (m-1) / (sum of the m smallest w)

    with the largest m for which all m candidates have pi_y > 0. For q = (.8, .2) and k = 2, w = (1.25, 5), t = 1/6.25
    and pi = (.8, .2). Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if k == 1:
        top = (q == q.amax(-1, keepdim=True)).double()
        return top / top.sum(-1, keepdim=True)
    w = q ** (-1 / (k - 1))  # (P, 8); infinite where q is 0
    lowest = w.sort(dim=-1).values
    t = torch.arange(w.shape[-1]) / lowest.cumsum(-1)  # (P, 8): one for each m
    m = (t * lowest < 1).sum(-1, keepdim=True)  # (P, 1); infinite w give nan, which is not less
    return (1 - t.gather(-1, m - 1) * w).clamp(min=0).where(q > 0, 0.0)


def best_pass_at_k(problems: Sequence[Problem], k: int, name: str = "suspects") -> torch.Tensor:
    """The highest pass@k, with k independent tries, of any policy that reads only the prompt: for each problem its
    expectation over the hidden answers, (P,) float64. Raises ValueError for k < 1."""
    q = posterior([problem.prompt for problem in problems], name)
    return (q * (1 - (1 - best_policy(q, k)) ** k)).sum(-1)


verify = partial(arithmetic.verify, answer_of=suspect)  # exact match of the name


@cache
def all_sets(held_out: bool) -> dict[int, list[tuple[str, ...]]]:
    """Every set of names on one side of the split, by level; names in the order of NAMES."""
    return {m: [names for names in combinations(NAMES, m) if is_held_out(names) == held_out] for m in LEVELS}


def training_problems(name: str) -> list[Problem]:
    """Equally many problems of each level: a random set in a random order, and an answer that is drawn from q."""
    rng, drawn = random.Random(0), []
    for level, sets in all_sets(held_out=False).items():
        for names in rng.choices(sets, k=TRAIN_PER_LEVEL):
            (answer,) = rng.choices(names, [PRIOR[name][y] for y in names])
            drawn.append(Problem(f"{' '.join(rng.sample(names, level))}:", answer, answer, level))
    return drawn


def spread_problems(name: str, held_out: bool = True) -> list[Problem]:
    """Up to TEST_PER_LEVEL problems of each level, with different prompts, evenly spread: every n-th set, by the chance
    of its likeliest name. Answers follow multiples of the golden ratio, which give each its share: random draws would
    move scores by a point or two. A level with fewer sets also has each set backwards: level 2 has all its orders."""
    rng, chosen = random.Random(0), []
    for level, sets in all_sets(held_out).items():
        q = {names: sorted((PRIOR[name][y] for y in names), reverse=True) for names in sets}
        orders = [rng.sample(names, level) for names in sorted(sets, key=lambda names: q[names][0] / sum(q[names]))]
        orders += [order[::-1] for order in orders] if len(orders) < TEST_PER_LEVEL else []
        count = min(TEST_PER_LEVEL, len(orders))
        for i in range(count):
            order = orders[(2 * i + 1) * len(orders) // (2 * count)]
            likely = sorted(order, key=NAMES.index)
            edges = list(accumulate(PRIOR[name][y] for y in likely))
            answer = likely[bisect(edges, (i * (5**0.5 - 1) / 2 + 0.5) % 1 * edges[-1])]
            chosen.append(Problem(f"{' '.join(order)}:", answer, answer, level))
    return chosen


def candidates(problem: Problem) -> tuple[Problem, ...]:
    """A problem for each name listed in this one's prompt, in its order, with that name as the answer."""
    return tuple(Problem(problem.prompt, name, name, problem.level) for name in listed(problem.prompt))


def load(name: str, data: None = None) -> Task:
    """The task of this name; always the same problems in the same order."""
    train = training_problems(name)
    groups = [candidates(problem) for problem in train]
    return Task(
        name, train, spread_problems(name), verify, instruction=INSTRUCTION, words=in_words, max_new_tokens=4,
        warm_start={"steps": 200, "batch": 16, "lr": 8e-3}, warm_start_problems=groups,
        best=partial(best_pass_at_k, name=name),
    )  # fmt: skip
