"""Tasks: problems in, rewards and votes out. Only learned.py, a reward model as a verifier, and hub.py know of models.

A task is whatever `load_task` returns: two sequences of `Problem` and one function, `verify`, that reads responses.
Your own task is a file with a function `load(name, data) -> Task`, for `--task FILE:load`; see docs/own.md. A task for
everybody is a module of this package, named in `MODULES`. This file imports torch only where a function needs it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# module of this package, whose `load(name, data)` returns the task -> names on the command line
MODULES = {
    "arithmetic": "arithmetic sums",
    "suspects": "suspects suspects_uniform",
    "code_tasks": "humaneval mbpp mbpp_sanitized code_contests taco programs",
    "math_tasks": "gsm8k math math500",
    "reasoning_gym": "reasoning_gym/",
}
TASKS = {name: module for module, names in MODULES.items() for name in names.split()}


class BadInput(ValueError):
    """The user's mistake, told in one line that says what to do; a script prints it and exits with code 2."""


def one_line(error: Exception) -> str:
    """What an error says, on one line, cut to 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt` is what the policy reads, `answer` what the verifier compares with, `solution` a reference
    response in full (the expert of supervised learning; "" if there is none), `level` its difficulty or None."""

    prompt: str
    answer: str
    solution: str = ""
    level: int | None = None


@dataclass
class Verdict:
    """What a verifier says of B groups of n responses.

    rewards: (B, n) float32, finite. votes: (B, n) int64; within a row equal numbers mean equal answers, -1 no answer.
    counts: events worth showing to the user, by name (timeouts, dead workers); empty when all went well. scores: (B, n)
    for Best-of-N to select by: a learned verifier's, else the rewards."""

    rewards: torch.Tensor
    votes: torch.Tensor
    counts: dict[str, int] = field(default_factory=dict)
    scores: torch.Tensor | None = None

    def __post_init__(self):
        if self.scores is None:
            self.scores = self.rewards


@dataclass
class Task:
    """Problems and their verifier.

    verify(problems, responses): the `Verdict` on n strings for each of B `Problem`s, a whole step at once.
    template: what a model without a chat template reads; "{prompt}" stands for the problem's prompt.
    words(prompt): what a pretrained model without a chat template reads, where the bare prompt suits `tiny` alone.
    instruction: what a model with a chat template reads after the prompt, in the same user turn.
    max_new_tokens: the longest response worth sampling, in tokens of the usual tokenizer for this task.
    warm_start: the recipe by which the `tiny` policy learns the task from `solution`s: optimiser `steps`, prompts per
    step (`batch`), peak learning rate (`lr`; twice that for Muon's matrices) and, optionally, `slips`, the share of
    random digits in the solutions. None where `tiny` cannot learn the task.
    warm_start_problems: groups of problems for the warm start. In a group of m, problems share a prompt, differ in
    their solutions, and count 1/m each. Empty: each problem of `train` is a group of its own.
    best(problems, k): for each problem the best possible pass@k of any policy that reads only its prompt, as an
    expectation over what the prompt leaves open: (P,) float64, exact. None where it is unknown."""

    name: str
    train: Sequence[Problem]
    test: Sequence[Problem]
    verify: Callable[[Sequence[Problem], Sequence[Sequence[str]]], Verdict]
    _: KW_ONLY
    template: str = "{prompt}"
    words: Callable[[str], str] | None = None
    instruction: str = ""
    max_new_tokens: int = 16
    warm_start: dict[str, float] | None = None
    warm_start_problems: Sequence[tuple[Problem, ...]] = ()
    best: Callable[[Sequence[Problem], int], torch.Tensor] | None = None


def load_task(name: str, data: str | None = None, sandbox: str = "auto") -> Task:
    """The task of this name. data: a local file or folder in place of the task's default source. sandbox: for tasks
    that run programs, the level of isolation (see sandbox/__init__.py), which is started and named here. Raises
    BadInput for an unknown name, for data that cannot be read or is of no use, and for an unavailable level."""
    module = TASKS.get(name) or TASKS.get(name.partition("/")[0] + "/")
    if module is None:
        raise BadInput(f"unknown task {name!r}: choose one of {', '.join(sorted(TASKS))}, or FILE:load")
    if data is not None and (module not in ("code_tasks", "math_tasks") or name == "programs"):
        raise BadInput(f"task {name!r} makes its own problems: leave --data out")
    task = importlib.import_module(f".{module}", __name__).load(name, data)
    if module == "code_tasks":
        from .sandbox.pool import shared

        print(f"sandbox: {shared(sandbox).level}")
    return task


def with_checked_verdicts(task: Task, only_01: str = "") -> Task:
    """The same task, whose `verify` returns tensors on the CPU without a graph, and raises BadInput for anything but a
    `Verdict` of the responses. only_01: what needs rewards and scores that are 0 or 1, for the error; "" if nothing.
    Scores that are the rewards stay the same tensor."""
    import torch

    def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
        verdict, of = task.verify(problems, responses), f"the verifier of {task.name}"
        if not isinstance(verdict, Verdict):
            raise BadInput(f"{of} must return a verifiers.Verdict, not {type(verdict).__name__}")
        try:
            verdict.counts = {name: int(count) for name, count in verdict.counts.items()}  # NumPy's and torch's as well
            if not all(isinstance(name, str) and name not in ("step", "eval") for name in verdict.counts):
                raise ValueError("a name must be text, and not step or eval, which each record has")
        except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise BadInput(f"{of} must return counts as whole numbers by name: {one_line(error)}") from error
        shape, own_scores = (len(responses), len(responses[0])), verdict.scores is not verdict.rewards
        for name in ("rewards", "votes", "scores"):
            value, dtype = getattr(verdict, name), "int64" if name == "votes" else "float32"
            tensor = isinstance(value, torch.Tensor)
            found = f"{str(value.dtype)[6:]} {tuple(value.shape)}" if tensor else type(value).__name__
            if found != f"{dtype} {shape}":
                raise BadInput(f"{of} must return {name} as a tensor of {dtype} {shape}, not {found}")
            for b, i in (~value.isfinite()).nonzero().tolist():
                what = f"{of} gave {name} that are not finite numbers, one of them to {responses[b][i][:40]!a}"
                raise BadInput(f"{what}: every response needs a number")
            setattr(verdict, name, value.detach().cpu())
        verdict.scores = verdict.scores if own_scores else verdict.rewards
        if only_01 and not all(((x == 0) | (x == 1)).all() for x in (verdict.rewards, verdict.scores)):
            raise BadInput(f"{only_01} is for rewards and scores 0 and 1, {task.name!r} has others: use another one")
        return verdict

    return dataclasses.replace(task, verify=verify)


def votes_from_answers(answers: Sequence[Sequence[Hashable | None]]) -> torch.Tensor:
    """Votes (B, n) int64 of B rows of n parsed answers: the index of the row's first equal answer, -1 for None."""
    import torch

    votes = [[-1 if answer is None else row.index(answer) for answer in row] for row in answers]
    return torch.tensor(votes, dtype=torch.int64)
