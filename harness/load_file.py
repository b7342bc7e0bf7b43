"""Code of the user's own, named FILE:NAME on the command line: what is loaded, how it is checked, how it may fail."""

import dataclasses
import hashlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from verifiers import BadInput, Task, Verdict, one_line


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
    module = ModuleType(str(Path(path).resolve()))  # a name that no other module has, whatever the file is called
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look it up there
    called(lambda: exec(compile(source, path, "exec"), vars(module)), path, "running the file")
    if not callable(vars(module).get(name)):
        own = [x for x, value in vars(module).items() if getattr(value, "__globals__", None) is vars(module)]
        raise BadInput(f"{path} has no function {name!r}; its functions: {', '.join(own) or 'none'}")
    return vars(module)[name], module, hashlib.sha256(source).hexdigest()


def called(function: Callable, path: str, doing: str):
    """function(). An exception in the file at `path` becomes a BadInput of one line that says where."""
    try:
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

    def verify(problems, responses) -> Verdict:
        return called(lambda: task.verify(problems, responses), path, "verify(problems, responses)")

    return dataclasses.replace(task, verify=verify), digest
