"""Tasks `reasoning_gym/<name>`: the procedural data sets of the reasoning-gym library, each with its own scorer.

Optional: pip install reasoning-gym==0.1.25. Names: reasoning_gym.factory.DATASETS, with their default settings. A
problem is made when it is first read, from (seed, index), the same on every run. Train and test differ by seed; test
holds no problem twice, and none of train. The answer is the last <answer>...</answer> of the response (the library's
convention), the reward the score, 0 to 1, and the vote the text of the answer. Worker processes (workers.py) make
problems and score answers: a scorer that raises, hangs or dies gives reward 0 and no vote, and is counted. They have
the user's rights: data sets whose scorer runs the answer as code (EVALUATED) are refused, and so are other versions of
the library, whose scorers nobody has read.
"""

import collections
import difflib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import BadInput, Problem, Task, Verdict, votes_from_answers
from .math_tasks import end_of
from .workers import Workers

VERSION = "0.1.25"
INSTALL = f"pip install reasoning-gym=={VERSION}"
# by reading all scorers of this version: the first four call `eval` on the answer, the others sympy's `parse_expr`
EVALUATED = """binary_matrix n_queens spiral_matrix string_insertion
countdown intermediate_integration polynomial_multiplication puzzle24 simple_integration""".split()
# entry i of seed s is drawn from Random(s + i), so seeds must lie further apart than the sizes
TRAIN_SEED, TRAIN_SIZE = 0, 100_000
TEST_SEED, TEST_SIZE = 1_000_000_000, 100
TEMPLATE = "Question: What is 17 + 25?\nAnswer: <answer>42</answer>\n\nQuestion: {prompt}\nAnswer:"
INSTRUCTION = "Think step by step, then give the final answer, and nothing else, between <answer> and </answer>."

GYM = Workers("reasoning_gym", limit_s=10.0)


@dataclass(frozen=True)
class GymProblem(Problem):
    """A problem, and where its entry is found: `seed` and `index` in the data set `dataset`."""

    dataset: str = ""
    seed: int = 0
    index: int = 0


def problems_at(name: str, seed: int, indices: Sequence[int]) -> list[GymProblem]:
    """The problems at these indices; the ones that cannot be made are left out."""
    entries = zip(indices, GYM.map([[name, seed, index] for index in indices]))
    made = [(index, *entry) for index, (entry, failure) in entries if not failure]
    return [GymProblem(text.strip(), answer or "", dataset=name, seed=seed, index=i) for i, text, answer in made]


class TrainProblems(Sequence):
    """`TRAIN_SIZE` problems, made on demand. The next problem replaces one that is in the test set."""

    def __init__(self, name: str, held_out: set[str]):
        self.name, self.held_out = name, held_out
        self.problem = functools.cache(self.problem)

    def __len__(self) -> int:
        return TRAIN_SIZE

    def __getitem__(self, index):
        places = range(TRAIN_SIZE)[index]  # one place, or those of a slice
        return self.problem(places) if isinstance(places, int) else [self.problem(place) for place in places]

    def problem(self, index: int) -> GymProblem:
        for candidate in range(index, index + 1000):
            for problem in problems_at(self.name, TRAIN_SEED, [candidate]):
                if problem.prompt not in self.held_out:
                    return problem
        raise BadInput(f"reasoning_gym/{self.name} has too few different problems to hold any out for testing")


def answer_in(response: str) -> str | None:
    """What the last <answer>...</answer> of a response holds, or None."""
    before, closed, _ = end_of(response).rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() or None if closed and opened else None


def verify(problems: Sequence[GymProblem], responses: Sequence[Sequence[str]]) -> Verdict:
    """The data set's own score of each answer; see `Task.verify`."""
    places = [(problem.dataset, problem.seed, problem.index) for problem in problems]
    rows = [[(*place, answer_in(response)) for response in row] for place, row in zip(places, responses)]
    asked = list(dict.fromkeys(question for row in rows for question in row if question[-1] is not None))
    scores = dict(zip(asked, GYM.map(asked)))
    found = [[scores.get(question, (None, None)) for question in row] for row in rows]
    counts = dict(collections.Counter(failure for row in found for _, failure in row if failure))
    voters = [[q[-1] if score is not None else None for q, (score, _) in zip(*pair)] for pair in zip(rows, found)]
    rewards = torch.tensor([[score or 0.0 for score, _ in row] for row in found])
    return Verdict(rewards, votes_from_answers(voters), counts)


def load(name: str, data: None = None) -> Task:
    """The task `reasoning_gym/<name>`; raises BadInput for unknown and refused names, and without the library."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise BadInput(f"task {name!r} needs the reasoning-gym library: {INSTALL}")
    if (version := importlib.metadata.version("reasoning-gym")) != VERSION:
        raise BadInput(f"the scorers of reasoning-gym {version} were not checked for what they do: {INSTALL}")
    from reasoning_gym.factory import DATASETS

    dataset = name.partition("/")[2]
    if dataset not in DATASETS:
        close = difflib.get_close_matches(dataset, DATASETS, cutoff=0.4) or sorted(DATASETS)[:3]
        raise BadInput(f"the reasoning-gym library has no data set {dataset!r}; try {', '.join(close)}")
    if dataset in EVALUATED:
        why = "its scorer runs the answer as code (eval or sympy.parse_expr), with all your rights"
        raise BadInput(f"reasoning-gym's {dataset!r} is refused: {why}. Choose another data set")
    test = {problem.prompt: problem for problem in problems_at(dataset, TEST_SEED, range(TEST_SIZE))}
    train, test = TrainProblems(dataset, set(test)), list(test.values())
    return Task(name, train, test, verify, template=TEMPLATE, instruction=INSTRUCTION, max_new_tokens=512)
