"""One worker of the sandbox: a plain script that `verifiers.sandbox` starts by path, without torch. See its docstring.

Three processes. The *fork server* imports the usual modules, locks itself in and forks; it never sees a test, so no
program finds one in its memory. The *judge*, its first child, holds the tests and decides. Each *program* is a fresh
child of the fork server, forked ahead; it waits for its source, then answers the judge's requests one at a time, in
plain data:

    judge -> program    {"source", "stdin"}                      what to run
    program -> judge    ["value", null] | ["error", type, text]  loaded (or, with stdin, ended)
    judge -> program    [target, args, kwargs]                   call this
    program -> judge    ["value", encoded] | ["error", type, text]

The judge is told what a call returned, never whether a test passed; it compares exact built-in types in its own memory.
A value that is not plain data stays in the program, and the judge holds a `Remote` reference, equal only to itself.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its code.py would hide the standard library's `code`

import atexit
import builtins
import ctypes
import errno
import functools
import gc
import json
import marshal
import math
import operator
import os
import resource
import select
import signal
import socket
import struct
import time
import types
from _socket import socketpair  # without the classes and enumerations around it, to be copied at each fork
from collections import deque

# Imported before the fork. Few: each shared library and each page makes every fork dearer.
PRELOAD = "bisect collections copy functools heapq itertools math operator random re string threading typing".split()
REPLY_BYTES = 16 << 20  # the longest answer to one call that the judge reads
CHANNEL = 3  # a program's descriptor of the socket to the judge
JUDGE_BYTES = 8 << 30  # address space of the judge, who reads what programs answer
STATUS = struct.Struct("id")  # wait status, CPU seconds
DESCRIPTORS = struct.Struct("ii")  # as SCM_RIGHTS takes them


# ---------------------------------------------------------------------------------------------------- messages

def send(channel: socket.socket, message, dumps=marshal.dumps) -> None:
    """Send one message of plain data."""
    data = dumps(message)
    channel.sendall(len(data).to_bytes(4, "big") + data)


def as_json(message) -> bytes:
    """The other way to write a message; see `receive`."""
    return json.dumps(message).encode()


def receive(channel: socket.socket, deadline: float | None = None, limit: int = 1 << 31, loads=marshal.loads):
    """The next message; two ends take turns, so nothing follows it. Raises EOFError, TimeoutError after `deadline`
    (time.monotonic; checked between parts, so set the channel's own timeout too), OverflowError beyond `limit` bytes.

    loads: json.loads for what comes from a hostile program or its judge; marshal trusts its input.
    """
    def more() -> bytes:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        part = channel.recv(1 << 16)
        if not part:
            raise EOFError("the other end is closed")
        return part

    data = more()
    while len(data) < 4:
        data += more()
    size = 4 + int.from_bytes(data[:4], "big")
    if size > limit:
        raise OverflowError(f"a message of {size} bytes")
    parts, received = [data[4:]], len(data)
    while received < size:
        parts.append(more())
        received += len(parts[-1])
    return loads(b"".join(parts))


def encode(value, reference):
    """Plain data as JSON, by exact type: subclasses lose theirs. reference(value) encodes everything else."""
    if value is None or type(value) in (bool, str, float):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < 1 << 63 else ["int", hex(value)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    for kind in (list, tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, reference), encode(v, reference)] for k, v in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if "decimal" in sys.modules and isinstance(value, sys.modules["decimal"].Decimal):
        return ["Decimal", str(value)]
    if "fractions" in sys.modules and isinstance(value, sys.modules["fractions"].Fraction):
        return ["Fraction", [encode(value.numerator, reference), encode(value.denominator, reference)]]
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), reference)
    return reference(value)


def decode(data, dereference):
    """The value that `encode` was given. dereference(number) is the object behind a reference.

    The data may come from a hostile program: only built-in types are made here, whatever it says.
    """
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind in ("list", "tuple", "set", "frozenset", "deque"):
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}[kind]
        return make([decode(item, dereference) for item in content])
    if kind == "dict":
        return {decode(k, dereference): decode(v, dereference) for k, v in content}
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(content)
    if kind == "Fraction":
        from fractions import Fraction

        return Fraction(*(decode(item, dereference) for item in content))
    if kind == "reference":
        return dereference(content)
    raise ValueError(f"unknown kind {kind!r}")


# ----------------------------------------------------------------------------------------------------- program

def program(load_filter, limits: list[tuple[int, tuple[int, int]]], channel: int, stdout: int) -> None:
    """Run one program in this process, the freshly forked child, and end it. `channel` and `stdout` lead to the judge.

    Whatever is called or read for the first time costs a page, here and up to the end: so plainly, and in few words.
    """
    os.setpgid(0, 0)
    os.dup2(stdout, 1)
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, 64)  # the judge's ends too: while it waits, the program must see the judge hang up
    job = marshal.loads(read_message())
    stdin = job["stdin"]
    if stdin is None:
        os.dup2(2, 0)  # /dev/null
        os.dup2(2, 1)
    else:
        file = file_of(stdin.encode(errors="replace"))
        os.dup2(file, 0)
        os.close(file)
    for what, limit in limits:
        resource.setrlimit(what, limit)
    load_filter()

    code = compiled(job["source"])
    module = types.ModuleType("program" if stdin is None else "__main__")
    sys.modules[module.__name__] = module
    if stdin is None:
        serve(code, module.__dict__)
        os._exit(0)
    exit_code = 0
    try:
        exec(code, module.__dict__)
        import threading

        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        exit_code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        write_message(error_of(error))
        exit_code = 1
    try:
        atexit._run_exitfuncs()  # where some programs print their buffered output
        sys.stdout.flush()
        sys.__stdout__.flush()
    except BaseException as error:
        write_message(error_of(error))
        exit_code = 1
    os._exit(exit_code & 255)


def read_message() -> bytes:
    """The judge's next message, b"" when it has hung up; nothing follows it."""
    data = more = os.read(CHANNEL, 1 << 13)
    while more and len(data) < 4 + int.from_bytes(data[:4], "big"):
        more = os.read(CHANNEL, 1 << 18)
        data += more
    return data[4:]


def write_message(message) -> None:
    """Answer the judge."""
    data = as_json(message)
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(CHANNEL, data):]


def lowered(what: int, soft: int, hard: int | None = None) -> tuple[int, tuple[int, int]]:
    """Arguments of resource.setrlimit that lower a limit, never raising one that is lower already."""
    now = resource.getrlimit(what)[1]
    wanted = (soft, soft if hard is None else hard)
    return what, wanted if now == resource.RLIM_INFINITY else tuple(min(limit, now) for limit in wanted)


def file_of(content: bytes) -> int:
    """A descriptor of an unnamed file with this content, read from its start: programs ask stdin for its size."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin")
    else:
        import tempfile
        fd, path = tempfile.mkstemp()
        os.unlink(path)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view):]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def compiled(source: str) -> types.CodeType:
    """The code of the source up to its first line that does not parse: text after the program is dropped."""
    source = source.replace("\r\n", "\n")
    while True:
        try:
            return compile(source, "<program>", "exec")
        except SyntaxError as error:
            lines = source.split("\n")
            source = "\n".join(lines[:min((error.lineno or 1) - 1, len(lines) - 1)])
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            return compile(f"raise SyntaxError({str(error)!r})", "<program>", "exec")


def serve(code: types.CodeType, namespace: dict) -> None:
    """Load the program, then answer calls until the judge hangs up."""
    objects = []

    def reference(value):
        objects.append(value)
        return ["reference", len(objects) - 1]

    def dereference(target):
        if isinstance(target, int):
            return objects[target]
        if target in namespace:
            return namespace[target]
        raise NameError(f"name {target!r} is not defined")

    request = b""
    while True:
        try:
            if not request:
                exec(code, namespace)
                message = ["value", None]
            else:
                target, args, kwargs = marshal.loads(request)
                function = OPERATIONS[target[1]] if isinstance(target, list) else dereference(target)
                message = ["value", encode(function(
                    *[decode(item, dereference) for item in args],
                    **{name: decode(item, dereference) for name, item in kwargs.items()},
                ), reference)]
        except BaseException as error:
            message = error_of(error)
        write_message(message)
        request = read_message()
        if not request:
            return


OPERATIONS = {
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "iter": iter, "next": next, "len": len,
    "str": str, "repr": repr, "bool": bool,
}


def error_of(error: BaseException) -> list[str]:
    """What the judge is told of an exception; system calls that were denied all read PermissionError."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        name = "PermissionError"
    try:
        text = str(error)[:200]
    except BaseException:
        text = ""
    return ["error", str(name), text]


# ------------------------------------------------------------------------------------------------------- judge

class Ended(BaseException):
    """The program is of no more use; a BaseException, so that no test's `except Exception` goes on without it."""


class Remote:
    """An object of the program, seen from the judge; `target` is its name or number there."""

    def __init__(self, run: "Run", target) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args, **kwargs):
        return self._run.call(self._target, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._run.call(["operation", "getattr"], (self, name), {})

    def __setattr__(self, name, value):
        self._run.call(["operation", "setattr"], (self, name, value), {})

    def __getitem__(self, key):
        return self._run.call(["operation", "getitem"], (self, key), {})

    def __iter__(self):
        return self._run.call(["operation", "iter"], (self,), {})

    def __next__(self):
        return self._run.call(["operation", "next"], (self,), {})

    def __len__(self):
        return self._run.call(["operation", "len"], (self,), {})

    def __contains__(self, item):
        return any(each == item for each in self)  # compared here: the object's own method could say anything

    def __bool__(self):
        return self._run.call(["operation", "bool"], (self,), {})

    def __str__(self):
        return self._run.call(["operation", "str"], (self,), {})

    def __repr__(self):
        return self._run.call(["operation", "repr"], (self,), {})

    def __eq__(self, other):
        return isinstance(other, Remote) and self._target == other._target

    __hash__ = object.__hash__


class Run:
    """One program under judgement: from its source to its end."""

    def __init__(self, control: socket.socket, job: dict) -> None:
        self.control, self.job, self.trouble, self.detail = control, job, None, ""
        _, (channel, self.stdout), _, _ = socket.recv_fds(control, 1, 2)
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, channel)
        self.channel.settimeout(job["wall"])
        self.deadline = time.monotonic() + job["wall"]

    def start(self, stdin: str | None) -> None:
        """Tell the program what it is."""
        self.guard(send, self.channel, {"source": self.job["source"], "stdin": stdin})

    def guard(self, function, *args):
        """function(*args); a program that is late, gone or not speaking the protocol ends the run."""
        try:
            return function(*args)
        except (TimeoutError, BlockingIOError):
            self.trouble, self.detail = "timed out", "wall time"
        except OverflowError as error:
            self.trouble, self.detail = "output truncated", str(error)
        except (OSError, EOFError):
            self.trouble, self.detail = "ended", "the program ended before its tests did"
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.trouble, self.detail = "failed", f"unreadable answer: {error}"[:200]
        raise Ended

    def reply(self):
        """What the program answers. Raises the exception that it met, under its built-in name."""
        if self.trouble:
            raise Ended
        kind, *content = self.guard(receive, self.channel, self.deadline, REPLY_BYTES, json.loads)
        if kind == "value" and len(content) == 1:
            return self.guard(decode, content[0], lambda number: Remote(self, int(number)))
        name, text = (str(part) for part in (content + ["", ""])[:2])
        self.detail = f"{name}: {text}"[:200]
        if name == "MemoryError":
            self.trouble = "out of memory"
            raise Ended
        if name == "PermissionError":
            self.trouble = "refused"
            raise Ended
        kind = getattr(builtins, name, None)
        raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(text)

    def call(self, target, args, kwargs):
        """Have the program call `target`, a name of its own or an operation, and return the result."""
        if self.trouble:
            raise Ended

        def reference(value):
            if isinstance(value, Remote):
                return ["reference", value._target]
            raise TypeError(f"cannot hand a {type(value).__name__} to the program")

        request = [target, [encode(a, reference) for a in args], {k: encode(v, reference) for k, v in kwargs.items()}]
        self.guard(send, self.channel, request)
        try:
            return self.reply()
        except StopIteration as error:  # the program's own would end the test's `all(...)` early, as if all was well
            if target == ["operation", "next"]:
                raise
            raise RuntimeError("StopIteration") from error

    def output(self, limit: int) -> bytes:
        """All that the program prints, read until it ends."""
        parts, size = [], 0
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.stdout], [], [], left)[0]:
                self.trouble = "timed out"
                raise Ended
            part = os.read(self.stdout, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > limit:
                self.trouble = "output truncated"
                raise Ended

    def end(self) -> tuple[int, float]:
        """End the program, whatever it does: its wait status (negative: the signal) and CPU seconds."""
        self.channel.close()
        os.close(self.stdout)
        self.control.send(b"e")
        status, cpu = STATUS.unpack(self.control.recv(STATUS.size))
        return os.waitstatus_to_exitcode(status), cpu


def judged(control: socket.socket, job: dict) -> dict:
    """The result of one job: a program with tests, or with cases of standard input and output."""
    start = time.monotonic()
    status, detail, value, cpu = "passed", "", None, 0.0
    cases = job["cases"] or [None]
    for case in cases:
        run = Run(control, job)
        try:
            run.start(None if case is None else case[0])
            if case is None:
                value = run_tests(run, job)
            else:
                status, detail = run_case(run, case[1])
        except Ended:
            status = "failed"
        except BaseException as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"[:200]
        code, seconds = run.end()
        cpu += seconds
        if run.trouble == "ended" or (case is not None and not run.trouble and code != 0):
            status = ended_as(code, seconds, job["cpu"])
        elif run.trouble:
            status = run.trouble
        detail = run.detail or detail
        if status != "passed":
            break
    if status == "passed":
        detail = ""
    else:
        value = None
    seconds = time.monotonic() - start
    return {"status": status, "detail": detail, "value": value, "seconds": seconds, "cpu": cpu, "nonce": job["nonce"]}


def run_tests(run: Run, job: dict):
    """Run the tests in this process, with the program's names standing for objects over there."""
    namespace = {"__name__": "tests"}
    run.reply()  # loaded
    exec(test_code(job["setup"]), namespace)
    namespace.update({name: Remote(run, name) for name in job["names"]})
    exec(test_code(job["tests"]), namespace)

    def reference(value):
        raise TypeError(f"`value` holds a {type(value).__name__}")

    return encode(namespace.get("value"), reference)


@functools.lru_cache(1024)
def test_code(text: str) -> types.CodeType:
    """The code of some tests, compiled once for all the responses to a problem."""
    return compile(text, "<tests>", "exec")


def run_case(run: Run, expected: str) -> tuple[str, str]:
    """Status and detail of one case of standard input and output; a non-zero exit is seen by the caller."""
    output = run.output(max(run.job["output"], 2 * len(expected))).decode(errors="replace")
    try:
        run.reply()
    except Ended:
        if run.trouble == "ended":
            run.trouble = None  # the way every program ends
    return ("passed", "") if same_output(output, expected) else ("failed", f"printed {output[:80]!r}")


def ended_as(code: int, cpu: float, limit: int) -> str:
    """The status of a program that ended by itself before its tests did."""
    if code == -signal.SIGXCPU or code == -signal.SIGKILL and cpu >= limit:
        return "timed out"
    return "killed" if code < 0 else "failed"


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs agree token by token; numbers with a point or exponent may differ by 1e-6 (relative or
    absolute), the tolerance of most contests."""
    ours, theirs = output.split(), expected.split()
    return len(ours) == len(theirs) and all(a == b or close(a, b) for a, b in zip(ours, theirs))


def close(a: str, b: str) -> bool:
    """Whether two tokens are nearly equal numbers, at least one of them not an integer literal."""
    if len(a) > 64 or len(b) > 64 or not any(c in a + b for c in ".eE"):
        return False
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


def judge(jobs: socket.socket, control: socket.socket) -> None:
    """Judge jobs until the pool hangs up."""
    while True:
        try:
            job = receive(jobs)
        except EOFError:
            return
        send(jobs, judged(control, job), as_json)


# ------------------------------------------------------------------------------------------------- fork server

def fork_server(control: socket.socket, load_filter, limits: list[tuple[int, tuple[int, int]]]) -> None:
    """Keep one program waiting for the judge; at its command, end this one and fork the next. Return when judge or pool
    hang up (the pool's life line is stdin)."""
    events = select.poll()
    events.register(control.fileno(), select.POLLIN)
    events.register(0, select.POLLIN)
    while True:
        ours, theirs = socketpair()
        stdout_read, stdout_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                program(load_filter, limits, theirs.fileno(), stdout_write)
            finally:
                os._exit(1)
        theirs.close()
        os.close(stdout_write)
        try:
            fds = DESCRIPTORS.pack(ours.fileno(), stdout_read)
            control.sendmsg([b"p"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            ours.close()
            os.close(stdout_read)
            again = events.poll() == [(control.fileno(), select.POLLIN)] and control.recv(1) != b""
        except OSError:
            again = False
        for kill in (os.killpg, os.kill):  # not yet reaped, so the number is still its own
            try:
                kill(pid, signal.SIGKILL)
            except OSError:
                pass
        _, status, usage = os.wait4(pid, 0)
        if not again:
            return
        control.send(STATUS.pack(status, usage.ru_utime + usage.ru_stime))


def unprivileged_user() -> None:
    """As root, become a user of our own, who owns nothing: limits on processes do not bind root.

    Kept: the capability to read, under Landlock's rules, an interpreter installed in root's home.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their high words
    libc.capget(header, sets)
    kept = sets[1] & 1 << 2 or sets[1] & 1 << 1  # CAP_DAC_READ_SEARCH, else CAP_DAC_OVERRIDE
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    for user in (1_500_000_000 + os.getpid(), 65534):  # a container may know only the first 65536
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            break
        except OSError:
            pass
    if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def restrict_files(ruleset: int) -> None:
    """From here on a Landlock ruleset, given as a descriptor, binds this process and its children; see `sandbox`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):  # PR_SET_NO_NEW_PRIVS, landlock_restrict_self
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(ruleset)


def filter_loader(instructions: bytes):
    """A function that makes this process subject to a seccomp filter, given as an array of struct sock_filter."""
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    filter_program = ctypes.byref(Program(len(instructions) // 8, instructions))

    def load() -> None:
        if prctl(22, 2, filter_program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            raise OSError(ctypes.get_errno(), "seccomp")

    return load


def no_hook(**_) -> None:
    """In place of os.register_at_fork: the hooks that `threading` and `random` leave for each new child cost more than
    the rest of it; a process with one thread has no use for the one, and programs shall share one random state."""


def unfiltered() -> None:
    """The filter of level `rlimits`: none."""


def tasks_of_user() -> int:
    """Processes and threads of this user now, as far as /proc shows them."""
    count = 0
    for pid in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            pass
    return count


def main() -> None:
    """sys.argv[1]: JSON of the limits and {"jobs": descriptor of the pool's socket, ...}: see `sandbox._Worker`."""
    settings = json.loads(sys.argv[1])
    jobs = socket.socket(fileno=settings["jobs"])
    sys.path += [path for path in settings["packages"] if path not in sys.path]
    os.environ.clear()
    os.register_at_fork = no_hook
    try:
        if hasattr(os, "sched_setaffinity"):  # judge and program take turns: on one core, neither has to wake another
            os.sched_setaffinity(0, {settings["core"]})
        for name in PRELOAD:
            __import__(name)
        sys.modules["random"].seed(0)  # for all programs: the same verdict each time
        os.setsid()  # away from the terminal and its signals
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        tasks = tasks_of_user()
        load_filter = unfiltered
        if settings["isolated"]:
            if os.geteuid() == 0:
                unprivileged_user()
                tasks = 0
            load_filter = filter_loader(bytes.fromhex(settings["program_filter"]))
            restrict_files(settings["ruleset"])
            filter_loader(bytes.fromhex(settings["worker_filter"]))()
    except Exception as error:
        send(jobs, {"error": f"{type(error).__name__}: {error}"}, as_json)
        return
    os.dup2(null, 1)
    os.dup2(null, 2)
    for _ in range(20):  # what every program does, until the interpreter has nothing left to adapt in these pages
        exec(compiled("from typing import List\ndef f(x: List[int]): return [x]"), {})
        decode(json.loads(as_json(encode([1, "a", (2.0, {"b": None})], None))), None)
    gc.collect()
    gc.freeze()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            resource.setrlimit(*lowered(resource.RLIMIT_AS, JUDGE_BYTES))
            load_filter()
            send(jobs, {}, as_json)
            judge(jobs, theirs)
        finally:
            os._exit(0)
    theirs.close()
    jobs.close()
    try:
        for what, limit in (
            (resource.RLIMIT_AS, settings["memory"]), (resource.RLIMIT_NOFILE, settings["open_files"]),
            (resource.RLIMIT_NPROC, settings["threads"] + tasks), (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(*lowered(what, limit))
        cpu = settings["cpu"]
        limits = [lowered(resource.RLIMIT_CPU, cpu, cpu + 1), lowered(resource.RLIMIT_FSIZE, 0)]
        fork_server(ours, load_filter, limits)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
