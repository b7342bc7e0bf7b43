"""`lines`: an underspecified task, whose best policies are known exactly.

A line y = a*x + b has a in 2..9 and b in 0..99. The prompt is one of its points, x in 3..15: "7>45:" says that x = 7
gives y = 45. The response names the line, "3*x+24". Between 1 and 8 lines fit a prompt, which is its level; one of them
is the hidden answer, as hidden tests are in programming, so that one try and many tries ask for different policies.

`lines`: b and x are uniform and a has the prior p(a) ~ 1/(a-1)^2. `tiny` is warm-started on uniform lines: it knows all
those that fit and prefers none. `lines_uniform`: every line is as likely as any other.

Given the prompt, the fitting line y is the answer with probability q_y ~ p(a). A policy pi that reads only the prompt
has pass@k = sum_y q_y (1 - (1 - pi_y)^k) with k independent tries; `best_policy` maximises it.
"""

import random
import re
import zlib
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch

from . import BadInput, Problem, Task, Verdict, votes_from_answers

SLOPES, OFFSETS, POINTS = range(2, 10), range(100), range(3, 16)  # a, b, x
PRIOR = {"lines": {a: 1 / (a - 1) ** 2 for a in SLOPES}, "lines_uniform": {a: 1.0 for a in SLOPES}}  # not normalised
TRAIN_PER_LEVEL = 4_000
TEST_PER_LEVEL = 100
INSTRUCTION = (
    "A line y = a*x+b, with whole numbers a from 2 to 9 and b from 0 to 99, goes through the point x>y. "
    "Name one such line: answer with nothing but a*x+b, such as 3*x+24."
)


def is_held_out(prompt: str) -> bool:
    """Whether the prompt belongs to the test set: a fixed fifth of all prompts."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def fitting_slopes(prompt: str) -> list[int]:
    """The slopes a of the lines that fit a prompt of this task, upwards: "7>45:" has 2..6, since 0 <= 45 - 7a <= 99."""
    x, y = map(int, prompt[:-1].split(">"))
    return [a for a in SLOPES if y - a * x in OFFSETS]


def fitting_lines(prompt: str) -> list[str]:
    """The responses that fit a prompt of this task, in the order of `fitting_slopes`: "7>45:" has "2*x+31", ..."""
    x, y = map(int, prompt[:-1].split(">"))
    return [f"{a}*x+{y - a * x}" for a in fitting_slopes(prompt)]


def posterior(prompts: Sequence[str], name: str = "lines") -> torch.Tensor:
    """q_y = P(answer = y | prompt) of each prompt's `fitting_lines`, 0 behind them: (P, 8) float64."""
    q = torch.zeros(len(prompts), len(SLOPES), dtype=torch.float64)
    for row, prompt in zip(q, prompts):
        weights = torch.tensor([PRIOR[name][a] for a in fitting_slopes(prompt)], dtype=torch.float64)
        row[: len(weights)] = weights / weights.sum()
    return q


def best_policy(q: torch.Tensor, k: int) -> torch.Tensor:
    """The policy with the highest pass@k where candidate y is right with probability q_y: (P, 8) float64.

    q: (P, 8) float64, zeros allowed; its rows and those returned add up to 1. k = 1: the likeliest candidate (equal
    shares of a tie). k >= 2: the stationary point of sum_y q_y (1 - (1 - pi_y)^k) under sum_y pi_y = 1,

        pi_y = max(0, 1 - t w_y),    w_y = q_y^(-1/(k-1)),    t = (m-1) / (sum of the m smallest w)

    with the largest m for which all m candidates have pi_y > 0. For q = (.8, .2) and k = 2, w = (1.25, 5), t = 1/6.25
    and pi = (.8, .2). Raises ValueError for k < 1.
    """
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


def best_pass_at_k(problems: Sequence[Problem], k: int, name: str = "lines") -> torch.Tensor:
    """The highest pass@k that any policy can have that reads only the prompt, for each problem: (P,) float64.

    It is the expectation over the hidden answers; k independent tries. Raises ValueError for k < 1.
    """
    q = posterior([problem.prompt for problem in problems], name)
    return (q * (1 - (1 - best_policy(q, k)) ** k)).sum(-1)


def line(response: str) -> str | None:
    """The line that the response names, as "3*x+24" without leading zeros, or None.

    Its numbers stay strings: they may have a hostile 10^6 digits.
    """
    match = re.fullmatch(r"([0-9]+)\*x\+([0-9]+)", response.strip())
    return match and "*x+".join(number.lstrip("0") or "0" for number in match.groups())


def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
    """Reward 1 where the response names the hidden line, 0 for any other, fitting or not; see `Task.verify`."""
    answers = [[line(response) for response in row] for row in responses]
    rewards = [[float(answer == problem.answer) for answer in row] for problem, row in zip(problems, answers)]
    return Verdict(torch.tensor(rewards), votes_from_answers(answers))


@cache
def all_problems(held_out: bool) -> dict[int, list[Problem]]:
    """Every (line, point) on one side of the split, by level."""
    levels = {level: [] for level in range(1, len(SLOPES) + 1)}
    for x in POINTS:
        for y in range(SLOPES[0] * x, SLOPES[-1] * x + OFFSETS[-1] + 1):
            prompt = f"{x}>{y}:"
            if is_held_out(prompt) == held_out:
                lines = fitting_lines(prompt)
                levels[len(lines)] += [Problem(prompt, line, line, len(lines)) for line in lines]
    return levels


def chance(problem: Problem, name: str) -> float:
    """The probability of this line and point, not normalised: x and b are uniform, a is not."""
    return PRIOR[name][int(problem.answer[0])]


def training_problems(name: str) -> list[Problem]:
    """As many random problems of each level; within a level, a line and a point are drawn as the task says."""
    rng = random.Random(0)
    drawn = []
    for pool in all_problems(held_out=False).values():
        drawn += rng.choices(pool, [chance(problem, name) for problem in pool], k=TRAIN_PER_LEVEL)
    return drawn


def test_problems(name: str) -> list[Problem]:
    """As many problems of each level, evenly spread: every n-th part of a level's probability gives one.

    They are ordered by the answer's place among the fitting lines, likeliest first, so that likely and unlikely answers
    have the shares they have in the task, where random draws would move what any policy scores by a point or two.
    """
    chosen = []
    for pool in all_problems(held_out=True).values():
        pool = sorted(pool, key=lambda problem: fitting_lines(problem.prompt).index(problem.answer))
        edges = list(accumulate(chance(problem, name) for problem in pool))
        chosen += [pool[bisect(edges, (i + 0.5) / TEST_PER_LEVEL * edges[-1])] for i in range(TEST_PER_LEVEL)]
    return chosen


def load(name: str, data: str | None = None) -> Task:
    """The task of this name; always the same problems in the same order."""
    if data is not None:
        raise BadInput(f"task {name!r} makes its own problems: leave --data out")

    def best(problems: Sequence[Problem], k: int) -> torch.Tensor:
        return best_pass_at_k(problems, k, name)

    return Task(
        name,
        training_problems(name),
        test_problems(name),
        verify,
        instruction=INSTRUCTION,
        max_new_tokens=8,
        warm_start={"steps": 1000, "batch": 128, "lr": 8e-3},
        warm_start_problems=[  # every line and point, and each level about equally often
            problem
            for pool in all_problems(held_out=False).values()
            for problem in pool * round(TRAIN_PER_LEVEL / len(pool))
        ],
        best=best,
    )
