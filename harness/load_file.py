"""Code of the user's own, named FILE:NAME on the command line: what is loaded, how it is checked, how it may fail."""

import dataclasses
import hashlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from verifiers import BadInput, Problem, Task, Verdict, one_line


def load_file(where: str) -> tuple[Callable, ModuleType, str]:
    """The function that "FILE:NAME" names, the module made of the file, and the SHA-256 of the file's bytes, in hex.

    The bytes that run are hashed. Raises BadInput for a file that cannot be read or run, or has no such function."""
    path, _, name = where.rpartition(":")
    if not path or not name:
        raise BadInput(f"{where!r} is not FILE:NAME, as in my_file.py:my_function")
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise BadInput(f"cannot read {path!r} of {where!r}: {error}") from error
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"own_{digest}")  # a name that no other module has, whatever the file is called; pickle uses it
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look it up there
    sys.path.append(str(Path(path).resolve().parent))  # after all others: modules beside the file can be imported
    called(lambda: exec(compile(source, path, "exec"), vars(module)), path, "running the file")
    if not callable(vars(module).get(name)):
        own = [x for x, value in vars(module).items() if getattr(value, "__globals__", None) is vars(module)]
        raise BadInput(f"{path} has no function {name!r}; its functions: {', '.join(own) or 'none'}")
    return vars(module)[name], module, digest


def called(function: Callable, path: str, doing: str):
    """function(). An exception in the file at `path` becomes a BadInput of one line that says where."""
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # what the file switches ends with the call
            return function()
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = path if line is None else f"{path}, line {line}"
        raise BadInput(f"{doing} failed at {place}: {one_line(error)}") from error


def load_estimator(where: str) -> tuple[Callable, Callable | None, str]:
    """The estimator "FILE:NAME", (rewards (B, n), k) -> (B, n); the file's metric, (rewards (B, n), k) -> (B,), or None
    if it has none; and the SHA-256 of the file.

    Both functions raise BadInput if the file's code raises, or if its result has another shape, is no floating-point
    tensor, or is not finite. Raises BadInput as `load_file` does."""
    function, module, digest = load_file(where)
    path, _, name = where.rpartition(":")

    def checked(function: Callable, name: str, columns: int) -> Callable:
        def values(rewards: torch.Tensor, k: int) -> torch.Tensor:
            own = rewards.clone()  # which the file may change
            result, shape = called(lambda: function(own, k), path, f"{name}(rewards, {k})"), rewards.shape[:columns]
            tensor = isinstance(result, torch.Tensor)
            if not (tensor and result.is_floating_point() and result.shape == shape):
                found = f"{str(result.dtype)[6:]} {tuple(result.shape)}" if tensor else type(result).__name__
                of = f"for rewards {tuple(rewards.shape)}"
                raise BadInput(f"{where}: {name} must return a float tensor {tuple(shape)} {of}, not {found}")
            if not result.isfinite().all():
                row = rewards[(~result.isfinite()).nonzero()[0, 0]].tolist()
                raise BadInput(f"{where}: {name} is not finite with k = {k} for rewards {row}")
            return result.detach()

        return values

    metric = getattr(module, "metric", None)
    return checked(function, name, 2), callable(metric) and checked(metric, "metric", 1) or None, digest


def load_own_task(where: str, data: str | None) -> tuple[Task, str]:
    """The task that the function "FILE:NAME" makes of (where, data), and the SHA-256 of the file.

    Raises BadInput as `load_file` does, and if the function raises or returns something else."""
    load, _, digest = load_file(where)
    path, _, name = where.rpartition(":")
    task = called(lambda: load(where, data), path, f"{name}({where!r}, {data!r})")
    if not isinstance(task, Task):
        raise BadInput(f"{where}: {name}(name, data) must return a verifiers.Task, not {type(task).__name__}")

    for name in ("train", "test"):
        problems = getattr(task, name)
        if not (hasattr(problems, "__len__") and hasattr(problems, "__getitem__")):
            raise BadInput(f"{where}: {name} must be a list of problems, not {type(problems).__name__}")
        every = name == "test" or isinstance(problems, (list, tuple))  # else made on demand: the first speaks for all
        count = len(problems) if every else min(1, len(problems))
        for problem in called(lambda: [problems[i] for i in range(count)], path, f"reading {name}"):
            if wrong := fault(problem):
                raise BadInput(f"{where}: {name} must have Problems: {wrong} in {ascii(problem)[:100]}")
    for name, right, what in TASK_FIELDS:
        if not right(value := getattr(task, name)):
            raise BadInput(f"{where}: {name} must be {what}, not {ascii(value)[:100]}")

    def checked(name: str, right: Callable, what: str) -> Callable | None:
        def values(*args):
            result = called(lambda: getattr(task, name)(*args), path, name)
            if not right(result, *args):
                raise BadInput(f"{where}: {name} must return {what}, not {ascii(result)[:100]}")
            return result

        return getattr(task, name) and values

    def verify(problems, responses) -> Verdict:
        return called(lambda: task.verify(problems, responses), path, "verify(problems, responses)")

    words = checked("words", lambda text, prompt: is_text(text), "text")
    best = checked("best", lambda x, problems, k: getattr(x, "shape", None) == (len(problems),), "a tensor (P,)")
    return dataclasses.replace(task, verify=verify, words=words, best=best), digest


def is_text(value) -> bool:
    """Whether it is a str that UTF-8 can write: tokenizers refuse a lone surrogate."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def fault(problem) -> str:
    """What is wrong with a problem of the user's: "" if nothing."""
    if not isinstance(problem, Problem):
        return f"there is a {type(problem).__name__}"
    texts = [name for name in ("prompt", "solution") if not is_text(getattr(problem, name))]
    return f"{texts[0]} is no text" if texts else "" if type(problem.level) in (int, type(None)) else "level is no int"


TASK_FIELDS = (  # name in Task, whether a value is right, and what is right in words
    ("template", lambda x: is_text(x) and "{prompt}" in x, "text with {prompt}"),
    ("instruction", is_text, "text"),
    ("max_new_tokens", lambda x: type(x) is int and x > 0, "a whole number from 1 on"),
    ("warm_start", lambda x: x is None or isinstance(x, dict) and {"steps", "batch", "lr"} <= {*x}, "None, or a dict "
     "with steps, batch and lr"),
    *((name, lambda x: x is None or callable(x), "None or a function") for name in ("words", "best")),
)  # fmt: skip
