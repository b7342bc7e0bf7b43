"""The pool: starts workers at one level of isolation, hands them programs, and replaces those that end."""

import atexit
import contextlib
import itertools
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

from .. import BadInput
from . import lock
from .codec import receive, send
from .worker import LATE

CASES = 4  # all the cases of one program together may take this many times the wall time of one
LEVELS = ("bubblewrap", "landlock", "rlimits")  # strongest first
STATUSES = ("passed", "failed", "timed out", "out of memory", "killed", "refused", "output truncated")
FOLDER = Path(__file__).parents[1]  # where a worker finds this package, as `sandbox`: without torch
START = "import sys; sys.path.insert(0, sys.argv[2]); from sandbox.worker import main; main()"


@dataclass(frozen=True)
class Limits:
    """Limits of one program, or of each of its cases; all cases together have CASES times the wall time of one.

    wall: seconds, enough for two programs per core that use up their CPU time. cpu: whole seconds; MBPP's slowest
    reference solution needs 3.6 to 4.7. memory: bytes of address space. output: bytes printed, or twice the expected
    ones if that is more. threads: of one program, itself included."""

    wall: float = 30.0
    cpu: int = 8
    memory: int = 1 << 30
    output: int = 1 << 20
    open_files: int = 64
    threads: int = 64


@dataclass(frozen=True)
class Program:
    """A program and its tests or cases.

    source: the untrusted Python. tests: Python that the judge runs to its end; `names` stand in it for the program's
    objects. A variable `value` that it leaves becomes `Result.value`, through JSON: integers of up to 4300 digits,
    lists for tuples. setup: Python that the judge runs before. cases: pairs of standard input and expected output,
    compared token by token. wall: seconds, where they are fewer than the pool's `Limits.wall`."""

    source: str
    tests: str = ""
    names: tuple[str, ...] = ()
    setup: str = ""
    cases: tuple[tuple[str, str], ...] = ()
    wall: float = math.inf


@dataclass(frozen=True)
class Result:
    """What became of a program. status: one of STATUSES. detail: why, in one line that may be the program's own words.
    value: see `Program`. wall, cpu: seconds that it took."""

    status: str
    detail: str = ""
    value: object = None
    wall: float = math.inf
    cpu: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all tests or cases passed."""
        return self.status == "passed"


class Sandbox(contextlib.AbstractContextManager):
    """A pool of workers at one level of isolation.

    level: "auto" or one of LEVELS; afterwards the level in force. workers: how many programs run at once, default two
    per core; each is kept to one core. Raises BadInput for an unavailable level."""

    def __init__(self, level: str = "auto", workers: int | None = None, limits: Limits = Limits()) -> None:
        if level != "auto" and level not in LEVELS:
            raise BadInput(f"unknown sandbox {level!r}: choose auto, {', '.join(LEVELS)}")
        self._cores = list(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
        self.count = workers or 2 * len(self._cores)  # while one waits for its program, the other works
        self.limits, self._lock, reasons = limits, threading.Lock(), []
        self._workers: list[_Worker] = []
        for self.level in LEVELS[:2] if level == "auto" else (level,):
            try:
                self._workers.append(self._start())
                break
            except BadInput as error:
                reasons.append(str(error))
        else:
            weaker = " or ".join(LEVELS[LEVELS.index(self.level) + 1 :]) or "on another system"
            why = f"no sandbox {level!r} here ({'; '.join(reasons)})"
            raise BadInput(f"{why}. Ask for a weaker one by name, --sandbox {weaker}, or repair it")
        self._fill()
        atexit.register(self.close)

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """The result of each program, in order; threads that call it take turns. Raises BadInput where no program is to
        blame: a worker cannot be replaced, or tests need a module that is missing.

        A program that timed out with less than half its wall time of CPU time may have starved. It runs again, alone:
        for a sixteenth of its wall time, because sleeping programs delay the others, then a quarter, then all of it.
        All these runs together may take as long as the first ones did."""
        with self._lock:
            start = time.monotonic()
            results = self._results(programs)
            end = 2 * time.monotonic() - start
            starved = [i for i, it in enumerate(results) if it.status == "timed out" and it.cpu < it.wall / 2]
            for share, i in itertools.product((1 / 16, 1 / 4, 1), starved):
                if results[i].status == "timed out" and len(programs) > 1 and time.monotonic() < end:
                    wall = share * min(programs[i].wall, self.limits.wall)
                    (results[i],) = self._results([replace(programs[i], wall=wall)])
        return results

    def _results(self, programs: Sequence[Program]) -> list[Result]:
        """The result of each program, run once, as many at a time as there are workers."""
        results: list[Result | None] = [None] * len(programs)
        pending = deque(range(len(programs)))
        lost: set[int] = set()  # programs whose worker died under them once
        busy: dict[_Worker, int] = {}
        try:
            self._fill()
            idle = list(self._workers)
            while pending or busy:
                while pending and idle:
                    worker, index = idle.pop(), pending.popleft()
                    worker.submit(programs[index], self.limits)
                    busy[worker] = index
                first = min(worker.deadline for worker in busy) - time.monotonic()
                ready = wait(list(busy), max(first, 0))
                for worker in ready or [worker for worker in busy if worker.deadline < time.monotonic()]:
                    index, result = busy.pop(worker), worker.result()
                    if result is None:
                        self._workers.remove(worker)
                        if worker.stop() == LATE or not ready:
                            result = Result("timed out", "the tests did not end in time")
                        elif index in lost:
                            result = Result("killed", "the judge died twice")
                        else:
                            lost.add(index)
                            pending.appendleft(index)
                        self._fill()
                        worker = self._workers[-1]
                    elif result.status == "no module":
                        raise BadInput(f"the tests of a problem need a module: {result.detail}. Install it")
                    results[index] = result
                    idle.append(worker)
        finally:  # of an error or Ctrl-C: answers that nobody waits for must not meet the next question
            for worker in busy:
                self._workers.remove(worker)
                worker.stop()
        return results

    def close(self) -> None:
        """End all workers and wait for them."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        atexit.unregister(self.close)

    def __exit__(self, *_) -> None:
        self.close()

    def _fill(self) -> None:
        """Start the workers that are missing."""
        while len(self._workers) < self.count:
            self._workers.append(self._start())

    def _start(self) -> "_Worker":
        """A worker that has locked itself in, proven by a program that tries the lock. Raises BadInput if it fails."""
        core = min(self._cores, key=[worker.core for worker in self._workers].count)
        try:
            worker = _Worker(self.level, self.limits, core)
        except (OSError, ImportError, RuntimeError) as error:  # a library that is missing is not an OSError
            raise BadInput(f"no sandbox worker at level {self.level}: {error}") from error
        if self.level != "rlimits":
            worker.submit(PROBE, self.limits)
            result = worker.result()
            if result is None or not result.passed:
                worker.stop()
                raise BadInput(f"no sandbox worker at level {self.level}: the lock does not hold: {result}")
        return worker


_pool: Sandbox | None = None


def shared(level: str = "auto") -> Sandbox:
    """The tasks' one pool. The first call starts it; a call that names another level replaces it. Raises BadInput."""
    global _pool
    if _pool and level not in ("auto", _pool.level):
        _pool.close()
        _pool = None
    _pool = _pool or Sandbox(level)
    return _pool


PROBE = Program(  # before a worker is used: every one of these must fail in it
    """
import os, socket
def attempts():
    for attempt in (
        lambda: os.listdir("/"), lambda: open("/proc/self/environ"), lambda: open("/etc/passwd"),
        lambda: open("/tmp/probe", "w"), lambda: socket.socket(), lambda: os.kill(os.getppid(), 0), os.fork,
        lambda: os.execv("/bin/true", ["true"]), lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    ):
        try: return [attempt()]
        except OSError: pass
""",
    "assert attempts() is None",
    ("attempts",),
)


class _Worker:
    """One worker process of the pool and the socket to its judge."""

    def __init__(self, level: str, limits: Limits, core: int) -> None:
        self.core = core
        self.jobs, theirs = socket.socketpair()
        readable, isolated, files = lock.readable(), level != "rlimits", {"jobs": theirs}
        settings = {"isolated": isolated, "packages": lock.packages(), "core": core, **vars(limits)}
        if isolated:
            files["ruleset"] = lock.ruleset(readable)
            settings |= lock.filters()
        settings |= {name: end.fileno() for name, end in files.items()}
        command = [sys.executable, "-BsPc", START, json.dumps(settings), str(FOLDER)]
        if level == "bubblewrap":
            command = lock.bubblewrap(readable) + command
        if os.path.exists("/proc/self/oom_score_adj"):  # when memory runs out, a worker dies, not the trainer
            command = ["/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj; exec "$@"', "sh", *command]
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "LD_BIND_NOW": "1"}  # the whole of it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        passed = [end.fileno() for end in files.values()]
        self.process = subprocess.Popen(command, env=environment, pass_fds=passed, cwd="/", **pipes)
        for end in files.values():
            end.close()
        try:
            receive(self.jobs, time.monotonic() + 60, 1 << 25, json.loads)  # its judge says hello
        except (EOFError, OSError):
            self.process.kill()  # if it hangs; else it has ended, or is about to
            self.process.wait()
            said = os.read(self.process.stderr.fileno(), 1 << 16) if wait([self.process.stderr], 0) else b""
            said = said.decode(errors="replace").strip().splitlines()
            self.stop()
            raise OSError(said[-1] if said else "it did not start") from None

    def fileno(self) -> int:
        """The descriptor that is readable when there is an answer."""
        return self.jobs.fileno()

    def submit(self, program: Program, limits: Limits) -> None:
        """Hand the worker a program; `deadline` is when it must have answered."""
        self.nonce = secrets.token_hex(16)  # an answer without it is not to this question
        wall = min(limits.wall, program.wall)
        total = wall * min(max(1, len(program.cases)), CASES)
        of_job = {"cpu": limits.cpu, "output": limits.output, "wall": wall, "total": total, "nonce": self.nonce}
        self.deadline = time.monotonic() + total + 10  # the judge keeps its own
        with contextlib.suppress(OSError):  # `result` finds it dead
            self.jobs.settimeout(60)
            send(self.jobs, {**vars(program), **of_job})

    def result(self) -> Result | None:
        """The worker's answer, or None if it is dead or late."""
        try:
            answer = receive(self.jobs, self.deadline, 1 << 25, json.loads)  # twice what a judge lets pass as `value`
            if not secrets.compare_digest(answer.pop("nonce"), self.nonce):
                return None
            return Result(**answer)
        except (EOFError, OSError, ValueError, TypeError, OverflowError, RecursionError):
            return None

    def stop(self) -> int:
        """End the worker: it kills and reaps its children when its standard input closes. Returns its exit code."""
        self.jobs.close()
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stderr.close()
        return self.process.wait()
