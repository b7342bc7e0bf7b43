"""Embedded tasks, small enough for a laptop.

`arithmetic`: multiplication at five levels of difficulty. The prompt is "47*85=", the response "3995". The last number
of a response is its answer and its vote, without leading zeros. A response that is no list of numbers has none.

`sums`: sums and products at three levels, in words, for pretrained models with a chat template. The prompt is "What is
47 + 85?", the response "132". The last number in a response is its answer, whatever stands around it: "47 + 85 = 132."
is right; "132.5", "-132" and "1,32" are other numbers.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Sequence

import torch

from . import Problem, Task, Verdict, votes_from_answers

# level -> the operation and the ranges of its two numbers
FACTORS = {
    1: ("*", range(1, 10), range(1, 10)),
    2: ("*", range(10, 100), range(1, 10)),
    3: ("*", range(10, 100), range(10, 31)),
    4: ("*", range(10, 100), range(10, 100)),
    5: ("*", range(100, 1000), range(10, 100)),
}
SUMS = {
    1: ("+", range(10, 100), range(10, 100)),
    2: ("+", range(100, 1000), range(10, 100)),
    3: ("*", range(10, 100), range(2, 10)),
}
TRAIN_PER_LEVEL = 6_000  # small levels repeat: a uniform draw from `train` is a uniform draw of the level
TEST_PER_LEVEL = 1_000


def problems_of_level(name: str, level: int, held_out: bool, rng: random.Random) -> list[Problem]:
    """All problems of a task's level on one side of the split, shuffled. A fixed fifth is held out, b*a with a*b."""
    operation, first, second = (SUMS if name == "sums" else FACTORS)[level]
    keys = {(a, b): f"{min(a, b)}{operation}{max(a, b)}" for a in first for b in second}
    pairs = [pair for pair, key in keys.items() if (zlib.crc32(key.encode()) % 5 == 0) == held_out]
    rng.shuffle(pairs)
    form = "What is {} {} {}?" if name == "sums" else "{}{}{}="
    values = [str(a + b if operation == "+" else a * b) for a, b in pairs]
    return [Problem(form.format(a, operation, b), value, value, level) for (a, b), value in zip(pairs, values)]


def number(response: str) -> str | None:
    """The last number of the response without leading zeros, or None. A string: it may have a hostile 10^6 digits."""
    digits = re.fullmatch(r"\s*(?:[0-9]+,)*([0-9]+)\s*", response)
    return (digits[1].lstrip("0") or "0") if digits else None


def number_in_words(response: str) -> str | None:
    """The last number in the response, with its sign and decimals, without leading zeros, or None."""
    numbers = re.findall(r"-?[0-9]+(?:[.,][0-9]+)*", response)
    return (numbers[-1].lstrip("0") or "0") if numbers else None


def verify(
    problems: Sequence[Problem], responses: Sequence[Sequence[str]], answer_of: Callable[[str], str | None] = number
) -> Verdict:
    """1 for a response with the problem's answer, as read by `answer_of`; see `Task.verify`."""
    answers = [[answer_of(response) for response in row] for row in responses]
    rewards = [[float(answer == problem.answer) for answer in row] for problem, row in zip(problems, answers)]
    return Verdict(torch.tensor(rewards), votes_from_answers(answers))


def load(name: str, data: None = None) -> Task:
    """The task of this name; always the same problems in the same order."""
    rng = random.Random(0)
    train, test = [], []
    for level in SUMS if name == "sums" else FACTORS:
        pool = problems_of_level(name, level, held_out=False, rng=rng)
        train += (pool * (TRAIN_PER_LEVEL // len(pool) + 1))[:TRAIN_PER_LEVEL]
        test += problems_of_level(name, level, held_out=True, rng=rng)[:TEST_PER_LEVEL]
    if name == "sums":
        form, words = "Question: {prompt}\nAnswer:", "Answer with the number only."
        check = functools.partial(verify, answer_of=number_in_words)
        return Task(name, train, test, check, template=form, instruction=words, max_new_tokens=12)
    warm_start = {"steps": 800, "batch": 128, "lr": 3e-3, "slips": 0.15}
    return Task(name, train, test, verify, max_new_tokens=8, warm_start=warm_start)
