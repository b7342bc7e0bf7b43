"""One worker, three processes. The *fork server* imports the usual modules, locks itself in and forks; it never sees a
test, so no program finds one in its memory. The *judge*, its first child, holds the tests and decides. Each *program*
is a fresh child of the fork server, forked ahead; it waits, then answers in plain data:

    judge -> program    {"source", "stdin", "tasks"}, later [target, args, kwargs]     what to run, what to call
    program -> judge    ["value", encoded] or ["error", class, text, name]     once loaded (or ended), and to each call
"""

import os
import sys

if __package__ == "sandbox":  # in a worker, and not where the pool or a test imports this file
    # Hooks that `threading` and `random` leave for each new child cost more than the rest of it; a process with one
    # thread does not need the first, and programs should share one random state.
    os.register_at_fork = lambda **_: None

import _socket  # without the classes and enumerations around it, to be copied at each fork
import atexit
import builtins
import contextlib
import errno
import gc
import io
import json
import operator
import resource
import select
import signal
import socket
import struct
import threading
import types

from .codec import OPERATORS, as_json, decode, encode, from_json, receive, send
from .judge import ENDED, PATIENCE, judge
from .lock import filter_loader, restrict_files, unprivileged_user

# Imported before the fork. Few: each shared library and each page makes every fork dearer.
PRELOAD = "bisect collections copy functools heapq itertools math operator random re string threading typing".split()
DEVICES = {os.devnull: 2, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
LATE = 3  # exit code of a worker whose judge did not end in time
CHANNEL = 3  # the descriptor of a program's socket to the judge: the lowest that the fork server has free
CONTROL = 63  # the descriptor of the fork server's own socket to the judge; below it, nothing of the worker stays open
open_descriptor = os.open  # which the worker replaces for programs
C_STACK = 64 << 20  # bytes: a recursion through `lru_cache` or `map` takes 500 a level, and contests raise the limit


def fork_server(control: socket.socket, load_filter, limits: list[tuple[int, tuple[int, int]]]) -> None:
    """Keep one program waiting for the judge; at its command, end it and fork the next. Return when one hangs up."""
    events = select.poll()
    events.register(control.fileno(), select.POLLIN)
    events.register(0, select.POLLIN)  # the pool

    def kill(*_) -> None:
        for send_signal in (os.killpg, os.kill):
            try:
                send_signal(pid, signal.SIGKILL)
            except OSError:
                pass

    signal.signal(signal.SIGALRM, kill)
    while True:
        theirs, ours = _socket.socketpair()
        stdout_read, stdout_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                run_program(load_filter, limits, theirs, stdout_write)
            finally:
                os._exit(1)
        theirs.close()
        os.close(stdout_write)
        command = b""
        try:
            fds = struct.pack("ii", ours.fileno(), stdout_read)
            control.sendmsg([b"p"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            ours.close()
            os.close(stdout_read)
            if events.poll() == [(control.fileno(), select.POLLIN)]:
                command = control.recv(PATIENCE.size)
        except OSError:
            pass
        if command and (patience := PATIENCE.unpack(command)[0]):  # it hung up, so it should end by itself
            signal.setitimer(signal.ITIMER_REAL, patience)
        else:
            kill()
        _, status, usage = os.wait4(pid, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not command:
            return
        control.send(ENDED.pack(status, usage.ru_utime + usage.ru_stime))


def with_devices(open_path, open_number):
    """`open_path` for programs. Devices are copies of descriptors; standard input starts anew, like a file."""

    def opened(file, *args, **kwargs):
        number = DEVICES.get(str(file))  # a text or a Path
        if number is None:
            return open_path(file, *args, **kwargs)
        if number == 0:
            os.lseek(0, 0, 0)
        return open_number(os.dup(number), *args, **kwargs)

    return opened


def lowered(what: int, soft: int, hard: int | None = None) -> tuple[int, tuple[int, int]]:
    """Arguments of resource.setrlimit that lower a limit, never raising one that is lower already."""
    now, hard = resource.getrlimit(what)[1], hard or soft
    most = hard if now == resource.RLIM_INFINITY else now
    return what, (min(soft, most), min(hard, most))


def run_program(load_filter, limits: list[tuple[int, tuple[int, int]]], channel: _socket.socket, stdout: int) -> None:
    """Run one program in this process, a freshly forked child, and end it. `channel` and `stdout` lead to the judge.
    Whatever is called or read for the first time costs a page."""
    os.setpgid(0, 0)
    os.dup2(stdout, 1)
    os.dup2(open_descriptor(os.devnull, os.O_RDWR), 2)  # opened anew, without flags that the last program set
    os.closerange(CHANNEL + 1, CONTROL + 1)  # the judge's ends too: the program, waiting, must see the judge hang up
    job = receive(channel)
    stdin = job["stdin"]
    redirect(stdin)
    for what, (soft, hard) in limits:
        if what == resource.RLIMIT_NPROC:
            soft = hard = min(soft + job["tasks"], hard)
        resource.setrlimit(what, (soft, hard))
    load_filter()
    sys.set_int_max_str_digits(0)  # 2**20000 is printed as in any other language

    if "numpy" in job["source"]:
        with contextlib.suppress(ImportError):
            __import__("numpy").random.seed(0)  # as `random` is before the fork: the same verdict each time
    if "torch" in job["source"]:
        __import__("tempfile").tempdir = "/"  # dill, which torch imports, asks for one, though it writes nothing there
    code = compiled(job["source"])
    module = types.ModuleType("program" if stdin is None else "__main__")
    module.__file__, sys.modules[module.__name__] = "program.py", module
    if stdin is None:
        with contextlib.suppress(EOFError):  # the judge hung up
            serve(channel, code, module.__dict__)
        os._exit(0)
    exit_code = 0
    try:
        exec(code, module.__dict__)
        for end in threading._threading_atexits:  # of thread pools, whose threads wait for work
            end()
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        exit_code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        send(channel, error_of(error), as_json)
        exit_code = 1
    try:
        atexit._run_exitfuncs()  # where some programs print their buffered output
        if not getattr(sys.stdout, "closed", sys.stdout is None):
            sys.stdout.flush()  # maybe the program's own, which needs the program's names
    except BaseException as error:
        send(channel, error_of(error), as_json)
        exit_code = 1
    with contextlib.suppress(BaseException):  # as at Python's own end
        sys.stdout = sys.__stdout__
        module.__dict__.clear()  # others print it when their objects end: files that nobody closed, `__del__`
        gc.collect()
        sys.stdout.flush()
    os._exit(exit_code & 255)


def redirect(stdin: str | None) -> None:
    """Let the program read `stdin`; where it is None, let it read and print nothing."""
    if stdin is None:
        os.dup2(2, 0)
        os.dup2(2, 1)
    else:
        # An unnamed file, not a pipe: programs ask standard input for its size.
        new = getattr(os, "memfd_create", lambda _: os.dup(__import__("tempfile").TemporaryFile().fileno()))
        file = new("stdin")
        os.pwrite(file, stdin.encode(errors="replace"), 0)
        os.dup2(file, 0)
        os.close(file)
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # it can seek
        sys.stdout = sys.__stdout__ = open(
            1, "w", encoding="utf-8", errors="surrogateescape", closefd=False
        )  # it cannot


def compiled(source: str) -> types.CodeType:
    """The code of the source up to its first line that does not parse: text after the program is dropped."""
    source = source.replace("\r\n", "\n")
    while True:
        try:
            return compile(source, "<program>", "exec")
        except SyntaxError as error:
            lines = source.split("\n")
            source = "\n".join(lines[: min((error.lineno or 1) - 1, len(lines) - 1)])
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            return compile(f"raise SyntaxError({str(error)!r})", "<program>", "exec")


def serve(channel: socket.socket, code: types.CodeType, namespace: dict) -> None:
    """Load the program, then answer calls; EOFError tells that the judge hung up."""
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

    request = None
    while True:
        try:
            if request is None:
                exec(code, namespace)
                message = ["value", None]
            else:
                target, args, kwargs = request
                function = OPERATIONS[target[1]] if isinstance(target, list) else dereference(target)
                args = [decode(item, dereference) for item in args]
                kwargs = {name: decode(item, dereference) for name, item in kwargs.items()}
                message = ["value", encode(function(*args, **kwargs), reference)]
        except BaseException as error:
            message = error_of(error)
        send(channel, message, as_json)
        request = receive(channel)


def fields(value) -> list | None:
    """Class and fields of a dataclass that compares by them, None for other objects: the judge compares the lists."""
    kind = type(value)
    if not hasattr(kind, "__dataclass_fields__") or not kind.__dataclass_params__.eq:
        return None
    names = [name for name, field in kind.__dataclass_fields__.items() if field.compare]
    return [kind.__name__, [getattr(value, name) for name in names]]


OPERATIONS = {function.__name__: function for function in (getattr, setattr, iter, next, len, str, repr, bool, abs)}
OPERATIONS |= {"fields": fields, "isinstance": isinstance}
OPERATIONS |= {"enter": operator.methodcaller("__enter__"), "exit": operator.methodcaller("__exit__", *[None] * 3)}
OPERATIONS |= {name: getattr(operator, f"__{name}__") for name in (*OPERATORS, "getitem", "neg")}


def error_of(error: BaseException) -> list[str]:
    """What the judge is told of an exception: the built-in class that an `except` would know it by, its text, its own
    class. System calls that were denied all read PermissionError."""
    kind = next((kind for kind in type(error).__mro__ if kind.__module__ == "builtins"), Exception)
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        kind = PermissionError
    text = ""
    with contextlib.suppress(BaseException):
        text = str(error)[:200]
    return ["error", kind.__name__, text, str(type(error).__name__)]


def furnish(packages: list[str]) -> None:
    """Make this process what programs find themselves in: modules, devices, an empty environment, one random state."""
    del sys.path[0]  # of this package
    sys.path += [path for path in packages if path not in sys.path]
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = ["program.py"]
    builtins.open = io.open = with_devices(open, open)
    os.open = with_devices(os.open, lambda number, *_, **__: number)
    locks = sys.modules["multiprocessing.synchronize"] = types.ModuleType("multiprocessing.synchronize")
    locks.SEM_VALUE_MAX = 1 << 30
    for name in "Lock RLock Semaphore BoundedSemaphore Condition Event Barrier".split():  # its own are files
        setattr(locks, name, lambda *args, ctx=None, kind=getattr(threading, name): kind(*args))
    for name in PRELOAD:
        __import__(name)
    sys.modules["random"].seed(0)  # for all programs: the same verdict each time


def main() -> None:
    """sys.argv[1]: JSON of the settings that `pool._Worker` makes. What goes wrong is the last line on stderr. The
    order is the lock: what needs rights comes first, then the locks, then the judge, and last the programs' limits."""
    settings = json.loads(sys.argv[1])
    jobs = socket.socket(fileno=settings["jobs"])
    if hasattr(os, "sched_setaffinity"):  # judge and program take turns: on one core, neither has to wake another
        os.sched_setaffinity(0, {settings["core"]})
    furnish(settings["packages"])
    os.setsid()  # away from the terminal and its signals
    os.chdir("/")
    load_filter, loadavg = lambda: None, -1
    with contextlib.suppress(OSError):  # in namespaces of its own, a worker sees no /proc and counts nobody else
        loadavg = os.open("/proc/loadavg", os.O_RDONLY)
    if settings["isolated"]:
        if os.geteuid() == 0 and unprivileged_user():
            loadavg = -1
        load_filter = filter_loader(bytes.fromhex(settings["program_filter"]))
        restrict_files(settings["ruleset"])
        filter_loader(bytes.fromhex(settings["worker_filter"]))(at_parents_end=0)
    os.dup2(1, 2)  # the null device: the pool has heard enough
    gc.collect()  # before what fills the free lists again
    ours, theirs = socket.socketpair()
    for _ in range(20):  # what every program does, until the interpreter has nothing left to adapt in these pages
        exec(compiled("from typing import List\ndef f(x: List[int]): return [x]"), {})
        send(ours, encode([1, "a", (2.0, {"b": None})], None), as_json)
        decode(receive(theirs, loads=from_json), None)
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            resource.setrlimit(*lowered(resource.RLIMIT_AS, settings["memory"]))  # answers may be large
            load_filter()
            send(jobs, {}, as_json)
            judge(jobs, theirs, loadavg)
        finally:
            os._exit(0)
    theirs.close()
    jobs.close()
    control = socket.socket(fileno=os.dup2(ours.detach(), CONTROL))
    os.closerange(CHANNEL, CONTROL)
    try:
        resource.setrlimit(*lowered(resource.RLIMIT_AS, settings["memory"]))
        resource.setrlimit(*lowered(resource.RLIMIT_CORE, 0))
        # Of programs only: what counts for all of a user's processes must not end the fork server.
        limits = [lowered(resource.RLIMIT_CPU, settings["cpu"], settings["cpu"] + 1)]
        limits += [lowered(resource.RLIMIT_NOFILE, settings["open_files"]), lowered(resource.RLIMIT_FSIZE, 0)]
        limits.append((resource.RLIMIT_STACK, (C_STACK, resource.getrlimit(resource.RLIMIT_STACK)[1])))
        limits.append(lowered(resource.RLIMIT_NPROC, settings["threads"], 1 << 30))  # from the first to the second
        fork_server(control, load_filter, limits)
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        sys.exit(LATE)
