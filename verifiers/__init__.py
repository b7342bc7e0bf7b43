"""Tasks: problems in, rewards and votes out. One verifier is a model, learned.py; no other file knows of models.

A task is whatever `load_task` returns: two sequences of `Problem` and one function, `verify`, that reads responses.
Your own task is a file with a function `load(name, data) -> Task`, for `--task FILE:load`; see docs/own.md. A task for
everybody is a module of this package, named in `MODULES`. This file imports torch only where a function needs it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
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
    counts: events worth showing to the user, by name (timeouts, dead workers); empty when all went well.
    scores: (B, n), what Best-of-N selects by: those of a learned verifier (see learned.py), else the rewards.
    seconds: how long it took.
    """

    rewards: torch.Tensor
    votes: torch.Tensor
    counts: dict[str, int] = field(default_factory=dict)
    scores: torch.Tensor | None = None
    seconds: float = 0.0

    def __post_init__(self):
        if self.scores is None:
            self.scores = self.rewards


@dataclass
class Task:
    """Problems and their verifier.

    verify(problems, responses): problems, a list of B `Problem`s, responses, a list of B lists of n strings; returns a
    `Verdict`. One call per step, so that a slow verifier can work on all B * n responses in parallel.
    template: what a model without a chat template reads; "{prompt}" stands for the problem's prompt.
    words(prompt): what a pretrained model without a chat template reads instead, where the bare prompt is a list that
    suits `tiny`. None where all read the template.
    instruction: what a model with a chat template reads after the prompt, in the same user turn.
    max_new_tokens: the longest response worth sampling, in tokens of the usual tokenizer for this task.
    warm_start: for an embedded task, the recipe by which the `tiny` policy learns it from `solution`s: optimiser
    `steps`, prompts per step (`batch`), peak learning rate (`lr`; twice that for Muon's matrices) and, optionally,
    `slips`: the share of digits in the solutions that are random ones. None where `tiny` cannot learn the task.
    warm_start_problems: what `tiny` is warm-started on where that is not `train`: groups of problems that share their
    prompt and differ in their solutions, each of which counts 1/m in a group of m. Empty: each problem of `train` is a
    group of its own.
    best(problems, k): for each problem the best possible pass@k of any policy that reads only its prompt, as an
    expectation over what the prompt leaves open: (P,) float64, exact. None where it is unknown.
    """

    name: str
    train: Sequence[Problem]
    test: Sequence[Problem]
    verify: Callable[[Sequence[Problem], Sequence[Sequence[str]]], Verdict]
    template: str = "{prompt}"
    words: Callable[[str], str] | None = None
    instruction: str = ""
    max_new_tokens: int = 16
    warm_start: dict[str, float] | None = None
    warm_start_problems: Sequence[tuple[Problem, ...]] = ()
    best: Callable[[Sequence[Problem], int], torch.Tensor] | None = None


def load_task(name: str, data: str | None = None, sandbox: str = "auto") -> Task:
    """The task of this name. `data`: a local file or folder in place of the task's default source. `sandbox`: for tasks
    that run programs, the level of isolation, which is started and named here (see sandbox/__init__.py).

    Raises BadInput for an unknown name, for `data` that cannot be read or that the task has no use for, and for a level
    of isolation that is not to be had.
    """
    module = TASKS.get(name) or TASKS.get(name.partition("/")[0] + "/")
    if module is None:
        raise BadInput(f"unknown task {name!r}: choose one of {', '.join(sorted(TASKS))}")
    task = importlib.import_module(f".{module}", __name__).load(name, data)
    if module == "code_tasks":
        from .sandbox.pool import shared

        print(f"sandbox: {shared(None if sandbox == 'auto' else sandbox).level}")
    return task


def with_checked_verdicts(task: Task) -> Task:
    """The same task, whose `verify` raises BadInput for what is not a `Verdict` of the responses: one line that names
    what it returned and what is wanted."""
    import torch

    def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
        verdict, of = task.verify(problems, responses), f"the verifier of {task.name}"
        if not isinstance(verdict, Verdict):
            raise BadInput(f"{of} must return a verifiers.Verdict, not {type(verdict).__name__}")
        shape = len(responses), len(responses[0])
        for name in ("rewards", "votes", "scores"):
            value, dtype = getattr(verdict, name), "int64" if name == "votes" else "float32"
            tensor = isinstance(value, torch.Tensor)
            found = f"{str(value.dtype)[6:]} {tuple(value.shape)}" if tensor else type(value).__name__
            if found != f"{dtype} {shape}":
                raise BadInput(f"{of} must return {name} as a tensor of {dtype} {shape}, not {found}")
            for b, i in (~value.isfinite()).nonzero().tolist():
                what = f"{of} gave {name} that are not finite numbers, one of them to {responses[b][i][:40]!a}"
                raise BadInput(f"{what}: every response needs a number")
        return verdict

    return dataclasses.replace(task, verify=verify)


def votes_from_answers(answers: Sequence[Sequence[Hashable | None]]) -> torch.Tensor:
    """Votes of B rows of n parsed answers: equal answers of a row share a number, None (no answer) is -1.

    The number is the position of the answer's first occurrence in its row. Returns (B, n) int64.
    """
    import torch

    rows = []
    for row in answers:
        first: dict[Hashable, int] = {}
        rows.append([-1 if answer is None else first.setdefault(answer, i) for i, answer in enumerate(row)])
    return torch.tensor(rows, dtype=torch.int64)
