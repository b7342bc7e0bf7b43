"""One worker, three processes. The *fork server* imports the usual modules, locks itself in and forks; it never sees a
test, so no program finds one in its memory. The *judge*, its first child, holds the tests and decides. Each *program*
is a fresh child of the fork server, forked ahead; it waits, then answers in plain data:

    judge -> program    {"source", "stdin"}, later [target, args, kwargs]     what to run, what to call
    program -> judge    ["value", encoded] or ["error", class, text, name]     once loaded (or ended), and to each call
"""

import os
import sys

if __package__ == "sandbox":  # in a worker, and not where the pool or a test imports this file
    # Hooks that `threading` and `random` leave for each new child cost more than the rest of it; a process with one
    # thread has no use for the one, and programs shall share one random state.
    os.register_at_fork = lambda **_: None

import builtins
import contextlib
import gc
import io
import json
import resource
import select
import signal
import socket
import struct
import threading
import types
from _socket import socketpair  # without the classes and enumerations around it, to be copied at each fork

from . import program
from .codec import as_json, decode, encode, from_json, send
from .judge import ENDED, PATIENCE, judge
from .lock import filter_loader, restrict_files, unprivileged_user

# Imported before the fork. Few: each shared library and each page makes every fork dearer.
PRELOAD = "bisect collections copy functools heapq itertools math operator random re string threading typing".split()
DEVICES = {os.devnull: 2, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
LATE = 3  # exit code of a worker whose judge did not end in time


def fork_server(control: socket.socket, load_filter, limits: list[tuple[int, tuple[int, int]]]) -> None:
    """Keep one program waiting for the judge; at its command, end this one and fork the next. Return when judge or pool
    hang up (the pool by stdin)."""
    events = select.poll()
    events.register(control.fileno(), select.POLLIN)
    events.register(0, select.POLLIN)

    def kill(*_) -> None:
        for send_signal in (os.killpg, os.kill):
            try:
                send_signal(pid, signal.SIGKILL)
            except OSError:
                pass

    signal.signal(signal.SIGALRM, kill)
    while True:
        ours, theirs = socketpair()
        stdout_read, stdout_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                program.run(load_filter, limits, theirs.fileno(), stdout_write)
            finally:
                os._exit(1)
        theirs.close()
        os.close(stdout_write)
        command, patience = b"", 0
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
        if patience:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not command:
            return
        control.send(ENDED.pack(status, usage.ru_utime + usage.ru_stime))


def with_devices(open_path, open_number):
    """`open_path` for programs. Devices, which they cannot open, are copies of descriptors; standard input starts anew,
    like a file."""

    def opened(file, *args, **kwargs):
        number = DEVICES.get(file) if isinstance(file, str) else None
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


def main() -> None:
    """sys.argv[1]: JSON of the settings that `sandbox._Worker` makes. What goes wrong is the last line on stderr."""
    settings = json.loads(sys.argv[1])
    del sys.path[0]  # of this package
    jobs = socket.socket(fileno=settings["jobs"])
    sys.path += [path for path in settings["packages"] if path not in sys.path]
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = ["program.py"]
    builtins.open = io.open = with_devices(open, open)
    os.open = with_devices(os.open, lambda number, *_, **__: number)
    locks = sys.modules["multiprocessing.synchronize"] = types.ModuleType("multiprocessing.synchronize")
    locks.SEM_VALUE_MAX = 1 << 30
    for name in "Lock RLock Semaphore BoundedSemaphore Condition Event Barrier".split():  # its own are files
        setattr(locks, name, lambda *args, ctx=None, kind=getattr(threading, name): kind(*args))
    if hasattr(os, "sched_setaffinity"):  # judge and program take turns: on one core, neither has to wake another
        os.sched_setaffinity(0, {settings["core"]})
    for name in PRELOAD:
        __import__(name)
    sys.modules["random"].seed(0)  # for all programs: the same verdict each time
    os.setsid()  # away from the terminal and its signals
    os.chdir("/")
    load_filter = lambda: None  # noqa: E731
    with contextlib.suppress(OSError):  # in namespaces of its own, a worker sees no /proc and counts nobody else
        os.dup2(os.open("/proc/loadavg", os.O_RDONLY), program.TASKS)
    if settings["isolated"]:
        if os.geteuid() == 0 and unprivileged_user():
            os.closerange(program.TASKS, program.TASKS + 1)
        load_filter = filter_loader(bytes.fromhex(settings["program_filter"]))
        restrict_files(settings["ruleset"])
        filter_loader(bytes.fromhex(settings["worker_filter"]))(at_parents_end=0)
    os.dup2(1, 2)  # the null device: the pool has heard enough
    gc.collect()  # before what fills the free lists again
    for _ in range(20):  # what every program does, until the interpreter has nothing left to adapt in these pages
        exec(program.compiled("from typing import List\ndef f(x: List[int]): return [x]"), {})
        decode(from_json(as_json(encode([1, "a", (2.0, {"b": None})], None))), None)
    gc.freeze()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            resource.setrlimit(*lowered(resource.RLIMIT_AS, settings["memory"]))  # answers may be large
            load_filter()
            send(jobs, {}, as_json)
            judge(jobs, theirs)
        finally:
            os._exit(0)
    theirs.close()
    jobs.close()
    try:
        resource.setrlimit(*lowered(resource.RLIMIT_AS, settings["memory"]))
        resource.setrlimit(*lowered(resource.RLIMIT_CORE, 0))
        # Of programs only: what counts for all of a user's processes must not end the fork server.
        limits = [lowered(resource.RLIMIT_CPU, settings["cpu"], settings["cpu"] + 1)]
        limits += [lowered(resource.RLIMIT_NOFILE, settings["open_files"]), lowered(resource.RLIMIT_FSIZE, 0)]
        limits.append(lowered(resource.RLIMIT_NPROC, settings["threads"], 1 << 30))  # from the first to the second
        fork_server(ours, load_filter, limits)
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        sys.exit(LATE)
