"""Calls on model output that may hang, crash or eat memory, made in child processes that can be killed.

`Workers(function).map(jobs)` is the parent's side. Run as a script, this file is the child: it reads one JSON job per
line on stdin, calls one of `FUNCTIONS` and answers with one JSON line. It imports neither torch nor this package, and
is not forked from a parent with threads. A job has `limit_s` of CPU time and CROWD times that of wall time, for a busy
machine shall change no verdict; an answer has `REPLY_BYTES`, a child `MEMORY_BYTES` of address space. A child ends with
its parent, idle (end of stdin) or stuck (its own alarm). All this is no sandbox for hostile programs.
"""

import collections
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


class Worker:
    """One child process, and the number of the job that it holds or None. Its first line says that it is ready."""

    def __init__(self, function: str, limit_s: float):
        # -P: this folder's reasoning_gym.py would hide the library
        command = [sys.executable, "-P", os.path.abspath(__file__), function, str(limit_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, **CHILD_ENVIRONMENT}, **pipes)
        self.ready, self.job, self.line = False, None, b""
        self.deadline = time.monotonic() + START_S

    def send(self, number: int, job: list, limit_s: float) -> None:
        self.job, self.deadline = number, time.monotonic() + CROWD * limit_s
        with contextlib.suppress(BrokenPipeError):  # it died while idle: `receive` will find the end of its output
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> dict | None:
        """Its next line, or None while only a part has come; called when there is something to read, so never waits.
        Raises EOFError when there will be no line, ValueError or RecursionError for one that is no JSON."""
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        self.line += part
        if not part or len(self.line) > REPLY_BYTES:
            raise EOFError
        if not self.line.endswith(b"\n"):
            return None
        line, self.line = self.line, b""
        return json.loads(line)

    def kill(self) -> int:
        """Its exit code, negative for a signal; no zombie stays."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        return self.process.wait()


class Workers:
    """Children that call one of `FUNCTIONS`: started when first needed, at most `count` (the CPUs, 8 at most)."""

    def __init__(self, function: str, limit_s: float = 5.0, count: int | None = None):
        self.function, self.limit_s, self.count = function, limit_s, count or min(os.cpu_count() or 1, 8)
        self.workers: list[Worker] = []
        self.lock = threading.Lock()

    def map(self, jobs: list[list]) -> list[tuple[object, str | None]]:
        """For each job, a list of arguments, in order: (result, None), or (None, failure): "timeouts" (of CPU time, so
        the job's fault), "late" (of wall time), "dead workers" or "errors" (the function raised). A result depends on
        its job alone. May be called from any thread. Raises RuntimeError if a child cannot start."""
        results: list = [(None, "dead workers")] * len(jobs)
        todo = collections.deque(enumerate(jobs))
        with self.lock:
            for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
                self.drop(worker)  # died between calls, which is no job's fault
            try:
                while todo or any(worker.job is not None for worker in self.workers):
                    while len(self.workers) < min(self.count, len(jobs)):
                        self.workers.append(Worker(self.function, self.limit_s))
                    for worker in self.workers:
                        if worker.ready and worker.job is None and todo:
                            worker.send(*todo.popleft(), self.limit_s)
                    self.collect(results)
            finally:  # interrupted: no later job may get the answer to an abandoned one
                for worker in [worker for worker in self.workers if worker.job is not None]:
                    self.drop(worker)
        return results

    def collect(self, results: list) -> None:
        """Wait until a worker speaks or runs out of time; note what came of its job."""
        waiting = [worker for worker in self.workers if worker.job is not None or not worker.ready]
        patience = min(worker.deadline for worker in waiting) - time.monotonic()
        speaking = wait([worker.process.stdout for worker in waiting], max(patience, 0))
        for worker in waiting:
            try:
                reply = worker.receive() if worker.process.stdout in speaking else None
                if reply is None:
                    if time.monotonic() < worker.deadline:
                        continue
                    raise TimeoutError
            except (EOFError, ValueError, RecursionError, TimeoutError) as end:
                code = self.drop(worker)
                if not worker.ready:
                    raise RuntimeError(f"the process for {self.function} did not start (exit code {code})") from end
                late = "late" if isinstance(end, TimeoutError) else "dead workers"
                results[worker.job] = None, "timeouts" if code == -signal.SIGPROF else late
            else:
                if worker.job is not None:
                    results[worker.job] = reply["result"], reply["failure"]
                elif reply["failure"]:
                    raise RuntimeError(f"the process for {self.function} did not start: {reply['failure']}")
                worker.ready, worker.job = True, None

    def drop(self, worker: Worker) -> int:
        self.workers.remove(worker)
        return worker.kill()

    def close(self) -> None:
        """End all children; the next `map` starts new ones. Not needed at exit: they end with this process."""
        while self.workers:
            self.drop(self.workers[0])


def number_key(value: Fraction) -> str:
    """One string for all numbers that agree when rounded to 6 decimals: math-verify's own tolerance, made a partition.
    A number that would vanish is rounded to 6 digits."""
    rounded = round(value, 6)
    return str(rounded) if rounded or not value else f"{Decimal(value.numerator) / Decimal(value.denominator):.5e}"


@functools.lru_cache(maxsize=4096)
def parsed(answer: str) -> list:
    """What math-verify reads in an answer: a sympy object and its text, or fewer."""
    import math_verify

    return math_verify.parse(f"${answer}$", parsing_timeout=None)


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
    try:
        form = canonical(parsed(answer)[0])
        tiny = re.fullmatch("0|[-0-9.]+e-[0-9]+", form)  # math-verify rounds to 6 decimals
        return [correct and not (tiny and canonical(parsed(gold)[0]) != form), form]
    except Exception:  # unparsed, or algebra that sympy cannot evaluate
        return [correct, "text " + "".join(answer.split())]


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
    os.dup2(2, 1)  # whatever a library prints stays out of the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
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
