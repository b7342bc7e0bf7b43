"""Which problems belong to some levels, to an evaluation, and to each step. All are functions of their arguments."""

import functools
import hashlib
import random
from collections.abc import Sequence

from verifiers import BadInput, Problem


def problems_at(
    problems: Sequence[Problem], levels: Sequence[int], what: str, data: str | None = None
) -> Sequence[Problem]:
    """The problems of these levels (all, if none are named). Raises BadInput if there are none.

    what: "training" or "held-out". data: the folder that they come from, if the user gave one."""
    if not problems:
        mend = "--steps 0 evaluates on held-out ones"
        if what == "held-out":
            mend = f"add test.jsonl to {data}" if data else "a run evaluates before and after training"
        raise BadInput(f"the task has no {what} problems here: {mend}")
    chosen = [problem for problem in problems if problem.level in levels] if levels else problems
    if not chosen:
        there = sorted({problem.level for problem in problems if problem.level is not None})
        have = f"the task has levels {there}" if there else f"the task has {len(problems)} problems without a level"
        raise BadInput(f"no {what} problems at --levels {' '.join(map(str, levels)) or '(all)'}: {have}")
    return chosen


def evaluation_problems(problems: Sequence[Problem], per_level: int) -> list[Problem]:
    """At most per_level problems of each level, the same for every seed of a run."""
    levels = sorted({problem.level for problem in problems}, key=lambda level: (level is None, level))
    pools = [[problem for problem in problems if problem.level == level] for level in levels]
    return [problem for pool in pools for problem in random.Random(0).sample(pool, min(per_level, len(pool)))]


def digest_of(problems: Sequence[Problem]) -> str:
    """The SHA-256, in hex, of all that these problems say."""
    return hashlib.sha256(repr([*problems]).encode(errors="backslashreplace")).hexdigest()


@functools.lru_cache(maxsize=2)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """0..size-1 in the order of this pass over the data."""
    return random.Random(f"{seed}/{epoch}").sample(range(size), size)


def training_batch(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The step-th batch. A pass has every problem once, and each pass has a new order."""
    places = (divmod(i, len(problems)) for i in range(step * size, (step + 1) * size))
    return [problems[shuffled(len(problems), seed, epoch)[i]] for epoch, i in places]
