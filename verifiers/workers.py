"""Calls on model output that may hang, crash or eat memory, made in child processes that can be killed.

`Workers(function).map(jobs)` is the parent's side: a thread for each child. Run as a script, this file is the child: it
reads one JSON job per line on stdin, calls one of `FUNCTIONS` and answers with one JSON line. It imports neither torch
nor this package. A job may take `limit_s` seconds of CPU time and CROWD times as many of wall time, for busy
machines. An answer may have `REPLY_BYTES`, a child `MEMORY_BYTES` of address space. A child ends with its
parent, idle (end of stdin) or stuck (its own alarm). This is no sandbox for hostile programs.
"""

import contextlib
import functools
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import wait

START_S = 120  # for the child's imports, on a slow disk
CROWD = 12  # the wall time of a job over its CPU time
MEMORY_BYTES = 4 << 30
REPLY_BYTES = 1 << 20
# With hash seed 0 the order of sympy's symbols, and so every result, is the same in all children; a thread per core
# takes address space and gains nothing here.
CHILD_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Workers:
    """Children that call one of `FUNCTIONS`: started when first needed, at most `count` (the CPUs, up to 8)."""

    def __init__(self, function: str, limit_s: float = 5.0, count: int | None = None):
        self.function, self.limit_s, self.count = function, limit_s, count or min(os.cpu_count() or 1, 8)
        self.children: list[subprocess.Popen] = []
        self.idle: list[subprocess.Popen] = []
        self.lock = threading.Lock()

    def map(self, jobs: list[list]) -> list[tuple[object, str | None]]:
        """For each job, a list of arguments, in order: (result, None), or (None, failure): "timeouts" (of CPU time, so
        the job's fault), "late" (of wall time), "dead workers" or "errors" (the function raised). A result depends on
        its job alone. May be called from any thread. Raises RuntimeError if a child cannot start."""
        with self.lock, ThreadPoolExecutor(self.count) as threads:
            for child in [child for child in self.idle if child.poll() is not None]:
                self.idle.remove(child)  # died between calls, which is no job's fault
                self.drop(child)
            try:
                return list(threads.map(self.result, jobs))
            except BaseException:  # interrupted: nobody waits for what they do now
                for child in [*self.children]:
                    child.kill(), child.wait()
                raise

    def result(self, job: list) -> tuple[object, str | None]:
        """What comes of one job in a child that is idle, or else in a new one."""
        try:
            child = self.idle.pop()
        except IndexError:
            child = self.started()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died while idle: `answer` finds the end of its output
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
            reply = answer(child, CROWD * self.limit_s)
        except (EOFError, ValueError, RecursionError, TimeoutError) as end:
            late = "late" if isinstance(end, TimeoutError) else "dead workers"
            return None, "timeouts" if self.drop(child) == -signal.SIGPROF else late
        self.idle.append(child)
        return reply["result"], reply["failure"]

    def started(self) -> subprocess.Popen:
        """A new child, whose first line said that it is ready."""
        # -P: this folder's reasoning_gym.py would hide the library
        command = [sys.executable, "-P", os.path.abspath(__file__), self.function, str(self.limit_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(command, env={**os.environ, **CHILD_ENVIRONMENT}, **pipes)
        self.children.append(child)
        try:
            why = answer(child, START_S)["failure"]
        except (EOFError, ValueError, TimeoutError):
            why = f"exit code {self.drop(child)}"
        if why:
            raise RuntimeError(f"the process for {self.function} did not start: {why}")
        return child

    def drop(self, child: subprocess.Popen) -> int:
        """End a child and return its exit code, negative for a signal."""
        self.children.remove(child)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        child.kill()
        return child.wait()

    def close(self) -> None:
        """End all children; the next `map` starts new ones. Not needed at exit: they end with this process."""
        self.idle.clear()
        while self.children:
            self.drop(self.children[0])


def answer(child: subprocess.Popen, seconds: float) -> dict:
    """The next line of a child. Raises TimeoutError if it takes longer, EOFError if the child ends or says more than
    REPLY_BYTES, ValueError or RecursionError for what is no JSON."""
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()  # looked at for each part, as one may drip in
        if left <= 0 or not wait([child.stdout], left):
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 1 << 16)
        line += part
        if not part or len(line) > REPLY_BYTES:
            raise EOFError
    return json.loads(line)


def number_key(value: Fraction) -> str:
    """One string for all numbers that agree when rounded to 6 decimals: math-verify's own tolerance, made a partition.
    Below 1, a number is rounded to 6 digits."""
    digits = f"{Decimal(value.numerator) / Decimal(value.denominator):.5e}" if abs(value) < 1 else None
    return str(Fraction(digits) if digits else round(value, 6))


@functools.lru_cache(maxsize=4096)
def parsed(answer: str) -> list:
    """What math-verify reads in an answer: a sympy object and its text, or fewer. i is the imaginary unit."""
    import math_verify
    import sympy

    found = math_verify.parse(f"${answer}$", parsing_timeout=None)
    if found and isinstance(found[0], sympy.Basic):
        found[0] = found[0].subs({symbol: sympy.I for symbol in found[0].free_symbols if symbol.name == "i"})
    return found


def check_math(gold: str, answer: str) -> list:
    """[whether math-verify finds the answer equal to the gold one, the answer's canonical form]. The form, a string, is
    what wrong answers vote by: a function of the answer alone, so an equivalence, which pairwise comparison is not."""
    import math_verify
    import sympy

    found = parsed(answer)
    parts = found[0].args if found and isinstance(found[0], sympy.FiniteSet) else ()
    inequalities = all(part.is_Relational and not isinstance(part, sympy.Eq) for part in parts)
    if parts and inequalities and len(found[0].free_symbols) == 1:
        with contextlib.suppress(NotImplementedError):  # sympy cannot solve one of them
            both = sympy.Intersection(*(part.as_set() for part in parts))
            found = [sympy.Union(*(part.as_set() for part in parts)) if "or" in answer or both.is_empty else both]
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}  # x < 3 is the interval (-oo, 3)
    correct = math_verify.verify(parsed(gold), found, **options)
    forms = [form_of(answer), form_of(gold)]
    numbers = all(re.fullmatch("-?[0-9]+(?:/[0-9]+)?", form) for form in forms)  # the forms decide for two numbers
    return [correct and not (numbers and forms[0] != forms[1] and "%" not in gold + answer), forms[0]]


@functools.lru_cache(maxsize=4096)
def form_of(answer: str) -> str:
    """An answer's canonical form, or its text where it cannot be read or sympy cannot evaluate it."""
    try:
        return canonical(parsed(answer)[0])
    except Exception:
        return "text " + "".join(answer.split())


def canonical(value) -> str:
    """Canonical form of what math-verify parsed; raises any exception where there is none."""
    import sympy
    from math_verify.grader import get_pct_val

    value = get_pct_val(value, value)  # math-verify takes 28% for 28, and so do we
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        return canonical(value.rhs)  # "x = 5" answers like "5"
    if isinstance(value, sympy.core.relational.Relational):
        value = value.canonical
    if isinstance(value, sympy.MatrixBase):
        return f"matrix {value.shape} {[canonical(entry) for entry in value.flat()]}"
    if isinstance(value, sympy.Interval) and value.is_open:
        value = sympy.Tuple(value.start, value.end)  # "(1, 2)" is more often a point
    if isinstance(value, sympy.Expr):
        return expression_key(value.doit())
    if not isinstance(value, sympy.Basic) or not value.args:
        return str(value)
    forms = [canonical(argument) for argument in value.args]
    ordered = not isinstance(value, (sympy.FiniteSet, sympy.Union, sympy.And, sympy.Or))
    return f"{type(value).__name__} {forms if ordered else sorted(forms)}"


def expression_key(value) -> str:
    """A number's `number_key`; for an expression with symbols, its value where each has a fixed value of its own."""
    if value.is_Rational:
        return number_key(Fraction(int(value.p), int(value.q)))
    if value.is_infinite and value.is_extended_real:
        return str(value)
    point = {symbol: 0.5 + zlib.crc32(symbol.name.encode()) / 2**32 for symbol in value.free_symbols}
    parts = value.evalf(30, subs=point).as_real_imag()
    if not all(part.is_Number and part.is_finite for part in parts):
        raise ValueError("no value at the point")
    if parts[1] == 0 and not point:
        return number_key(Fraction(str(parts[0])))
    return f"{parts[0].n(10)} {parts[1].n(10)}" + (" symbolic" if point else "")


@functools.lru_cache(maxsize=1024)
def gym_entry(name: str, seed: int, index: int) -> tuple:
    """A reasoning-gym data set and its entry number `index`."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, seed=seed, size=index + 1)
    return dataset, dataset[index]


def ask_gym(name: str, seed: int, index: int, answer: str | None = None) -> list | float:
    """[question, reference answer or None] of a reasoning-gym entry; given an answer, its score by the data set."""
    dataset, entry = gym_entry(name, seed, index)
    if answer is None:
        return [entry["question"], entry["answer"]]
    return float(dataset.score_answer(answer, entry))


# name -> the function and the library that it needs
FUNCTIONS = {"math": (check_math, "math_verify"), "reasoning_gym": (ask_gym, "reasoning_gym")}


def serve(name: str, limit_s: float) -> None:
    """Answer jobs until the end of stdin."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what a library prints out of the replies
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group: they are the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses it
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()

    def reply(result: object, failure: str | None) -> None:
        print(json.dumps({"result": result, "failure": failure}), file=replies, flush=True)

    function, library = FUNCTIONS[name]
    try:
        importlib.import_module(library)
    except Exception as error:
        return reply(None, f"{type(error).__name__}: {error}")
    reply(None, None)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # unhandled: ends this process, even if the parent is gone
        try:
            result, failure = function(*json.loads(line)), None
        except Exception:
            result, failure = None, "errors"
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(result, failure)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
