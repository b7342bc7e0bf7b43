"""The judge: the process that holds a program's tests, has the program called, and decides. A value that is no plain
data stays in the program, and the judge holds a `Remote` reference to it."""

import builtins
import contextlib
import functools
import gc
import itertools
import math
import os
import random
import re
import select
import signal
import socket
import struct
import time

from .codec import OPERATORS, as_json, decode, encode, from_json, receive, send

REPLY_BYTES = 16 << 20  # the longest answer to one call that is read
GRACE = 1.0  # seconds after a program's deadline in which the judge must be done with it, or it ends itself
ENDED = struct.Struct("id")  # from the fork server: wait status, CPU seconds
PATIENCE = struct.Struct("d")  # to the fork server: how many seconds a program has to end by itself
TROUBLES = {"MemoryError": "out of memory", "PermissionError": "refused"}
NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,9})?")
code_of = functools.lru_cache(512)(functools.partial(compile, filename="<tests>", mode="exec"))  # once per problem


class Ended(BaseException):
    """The run of the program is over. A BaseException: no test's `except Exception` catches it."""


class Remote:
    """An object of the program, seen from the judge; `target` is its name or number there. Operators take two of them:
    from an operand of the tests' own the program would learn what is expected."""

    def __init__(self, run: "Run", target) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args, **kwargs):
        return self._run.call(self._target, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._run.call(["operation", "getattr"], (self, name), {})

    def __contains__(self, item):
        return any(each == item for each in self)  # compared here: the object's own method could say anything

    def __eq__(self, other):
        if not isinstance(other, Remote) or self._target == other._target:
            return isinstance(other, Remote)
        ours, theirs = (self._run.call(["operation", "fields"], (each,), {}) for each in (self, other))
        return ours is not None and ours == theirs

    __hash__ = object.__hash__

    def __instancecheck__(self, item):
        return isinstance(item, Remote) and self._run.call(["operation", "isinstance"], (item, self), {})

    def __exit__(self, *_):
        self._run.call(["operation", "exit"], (self,), {})  # it keeps no exception of the tests back


for _name in "setattr getitem iter next len bool str repr neg abs enter".split() + OPERATORS:
    _ask = lambda self, *args, name=_name: self._run.call(["operation", name], (self, *args), {})  # noqa: E731
    setattr(Remote, f"__{_name}__", _ask)
for _name in OPERATORS:
    _of_two = lambda a, b, ask=getattr(Remote, f"__{_name}__"): ask(a, b) if isinstance(b, Remote) else NotImplemented  # noqa: E731
    setattr(Remote, f"__{_name}__", _of_two)


class Run:
    """One program under judgement, from source to end. `trouble`: None, a status, or "ended"."""

    def __init__(self, control: socket.socket, job: dict, end: float) -> None:
        self.control, self.job, self.trouble, self.detail, self.rest = control, job, None, "", bytearray()
        _, (channel, self.stdout), _, _ = socket.recv_fds(control, 1, 2)
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, channel)
        now = time.monotonic()
        self.deadline = min(now + job["wall"], end)
        signal.setitimer(signal.ITIMER_REAL, max(self.deadline - now, 0) + GRACE)  # unhandled: the end of this process

    def guard(self, function, *args):
        """function(*args); a program that is late, gone, too large or not speaking the protocol ends the run."""
        if function is send:
            self.channel.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        try:
            return function(*args)
        except (TimeoutError, BlockingIOError):
            self.trouble, self.detail = "timed out", "wall time"
        except (OSError, EOFError):
            self.trouble, self.detail = "ended", "the program ended before its tests did"
        except MemoryError:
            self.trouble, self.detail = "out of memory", "too large an answer"
        except OverflowError as error:
            self.trouble, self.detail = "output truncated", str(error)
        except Exception as error:
            self.trouble, self.detail = "failed", f"unreadable answer: {error}"[:200]
        raise Ended

    def reply(self):
        """What the program answers. Raises the exception that it met, under its built-in name."""
        kind, content, *names = self.guard(receive, self.channel, self.deadline, REPLY_BYTES, from_json, self.rest)
        if kind == "value":
            return self.guard(decode, content, lambda number: Remote(self, int(number)), self.deadline)
        text, name = names
        detail = f"{name}: {text}"[:200]
        if content in TROUBLES:
            self.trouble, self.detail = TROUBLES[content], detail
            raise Ended
        kind = getattr(builtins, content, None)
        kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError
        error = kind.__new__(kind, text)  # not initialised: UnicodeDecodeError would ask for five arguments
        error.of_program = detail
        raise error

    def call(self, target, args, kwargs):
        """Have the program call `target`, a name of its own or an operation, and return the result."""
        if self.trouble:
            raise Ended

        def reference(value):
            if isinstance(value, Remote):
                return ["reference", value._target]
            raise TypeError(f"cannot hand a {type(value).__name__} to the program")

        kwargs = {name: encode(value, reference) for name, value in kwargs.items()}
        self.guard(send, self.channel, [target, [encode(value, reference) for value in args], kwargs])
        try:
            return self.reply()
        except StopIteration as error:  # the program's own would end the test's `all(...)` early, as if all was well
            if target == ["operation", "next"]:
                raise
            raise RuntimeError("StopIteration") from error

    def output(self, limit: int) -> bytes:
        """All that the program prints, read until it ends; to be called by `guard`."""
        parts = [b"-"]
        while parts[-1]:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.stdout], [], [], left)[0]:
                raise TimeoutError
            parts.append(os.read(self.stdout, 1 << 16))
            limit -= len(parts[-1])
            if limit < 0:
                raise OverflowError("more output than is read")
        return b"".join(parts[1:])

    def end(self) -> tuple[int, float]:
        """The program's exit code (negative: the signal) and CPU seconds, once it has ended. A program that hung up
        ends by itself, in its time: its code must not depend on who was faster. Others are killed."""
        late = self.deadline - time.monotonic() if self.trouble == "ended" else 0
        self.control.send(PATIENCE.pack(max(late, 0)))
        status, cpu = ENDED.unpack(self.control.recv(ENDED.size))
        self.channel.close()
        os.close(self.stdout)
        return os.waitstatus_to_exitcode(status), cpu


def judged(control: socket.socket, job: dict, loadavg: int) -> dict:
    """The result of one job: a program with tests, or with cases of standard input and output. loadavg: see `judge`."""
    start, spent = time.monotonic(), 0.0
    for case in job["cases"] or [None]:
        run = Run(control, job, start + job["total"])
        try:
            asked = {"source": job["source"], "stdin": case and case[0], "tasks": tasks_now(loadavg)}
            run.guard(send, run.channel, asked)
            status, detail, value = outcome(run, case)
        except BaseException:  # Ended, or an exception whose text is the program's to tell
            status, detail, value = "failed", "", None
        code, cpu = run.end()
        spent += cpu
        if run.trouble == "ended" and (case is None or code != 0):
            late = cpu >= job["cpu"] or time.monotonic() >= run.deadline
            timed_out = code == -signal.SIGXCPU or code == -signal.SIGKILL and late
            status, detail = "timed out" if timed_out else "killed" if code < 0 else "failed", run.detail
        elif run.trouble not in (None, "ended"):
            status, detail = run.trouble, run.detail
        if status != "passed":
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    if status == "out of memory":
        gc.collect()  # the next program has all the memory again
    value = value if status == "passed" else None
    seconds = {"wall": time.monotonic() - start, "cpu": spent}
    return {"status": status, "detail": detail, "value": value, **seconds, "nonce": job["nonce"]}


def tasks_now(loadavg: int) -> int:
    """Processes and threads that the limit on a program's counts beside its own; 0 if it cannot be known."""
    with contextlib.suppress(OSError):
        return int(os.pread(loadavg, 99, 0).split()[3].partition(b"/")[2])
    return 0


def outcome(run: Run, case: tuple[str, str] | None) -> tuple[str, str, object]:
    """Status, detail and value of one run, if nothing else is wrong with it."""
    try:
        if case is None:
            return "passed", "", run_tests(run)
        expected = case[1].encode(errors="replace")
        detail = difference(run.guard(run.output, max(run.job["output"], 2 * len(expected))), expected)
        try:
            run.reply()
            return "failed", "an answer to no question", None
        except Ended:  # the way every program ends
            return "failed" if detail else "passed", detail, None
    except ModuleNotFoundError as error:
        return "failed" if hasattr(error, "of_program") else "no module", str(error), None
    except MemoryError:
        return "out of memory", "the tests", None
    except Exception as error:
        return "failed", getattr(error, "of_program", "") or f"{type(error).__name__}: {error}"[:200], None


def run_tests(run: Run):
    """Run the tests in this process, with the program's names standing for objects over there; their `value`."""
    tests = run.job["setup"] + run.job["tests"]
    seed = hash(tests + run.job["source"])  # the tests draw what no program foresees, and the same each time
    random.seed(seed)
    if "numpy" in tests:
        __import__("numpy").random.seed(seed & 0xFFFFFFFF)
    namespace = {"__name__": "tests"}
    run.reply()  # loaded
    try:
        code = code_of if len(tests) < 1 << 14 else code_of.__wrapped__  # large ones are not kept
        exec(code(run.job["setup"]), namespace)
        namespace.update({name: Remote(run, name) for name in run.job["names"]})
        exec(code(run.job["tests"]), namespace)
        value = namespace.get("value")
        if len(as_json(value)) > REPLY_BYTES:
            raise ValueError("`value` is too large")
        return value
    finally:
        namespace.clear()  # functions and their namespace refer to each other


def difference(output: bytes, expected: bytes) -> str:
    """Where two outputs first differ, token by token; "" if nowhere. A number may differ by 1e-6, relative or absolute,
    from an expected one with a point or exponent, the tolerance of most contests: 2.5 from 2.500001, not 3.0 from 3."""
    for ours, theirs in itertools.zip_longest(output.split(), expected.split(), fillvalue=b""):
        near = re.search(rb"[.eE]", theirs) and len(ours) <= 1000 and all(map(NUMBER.fullmatch, (ours, theirs)))
        if ours != theirs and not (near and math.isclose(float(ours), float(theirs), rel_tol=1e-6, abs_tol=1e-6)):
            ours, theirs = (repr(token[:40].decode(errors="replace"))[1:-1] or "nothing" for token in (ours, theirs))
            return f"printed {ours}, expected {theirs}"
    return ""


def judge(jobs: socket.socket, control: socket.socket, loadavg: int) -> None:
    """Judge jobs until the pool hangs up. loadavg: the descriptor of /proc/loadavg where the limit on processes also
    counts others, else -1."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(EOFError):
        while True:
            job = receive(jobs)
            send(jobs, judged(control, job, loadavg), as_json)
