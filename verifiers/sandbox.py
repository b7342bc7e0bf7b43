"""Running programs that a model wrote: what they may do, for how long, and whether they passed.

    with Sandbox() as sandbox:
        result, = sandbox.run([Program("def f(x): return x + 1", tests="assert f(1) == 2", names=("f",))])
        result.passed

**The verdict cannot be forged.** The tests never enter the process that runs the program. They run in a *judge*, for
which the program's names stand for objects over there: a call goes out, plain data comes back, and the judge compares
exact built-in types in its own memory. So exit codes, printed words, patched built-ins, an `__eq__` that is always
true, and a search for the expected values in memory or on disk get nowhere. The judge reports to the pool over a socket
that the program does not have, with a secret drawn anew for each program. `sandbox_worker` describes the processes.

**Levels**, strongest first. A level is in force or refused, never replaced by a weaker one, and each worker proves its
lock with a program that tries it. `auto` is the strongest of the first two.

- `bubblewrap`. Needs the program `bwrap`, and all that `landlock` needs. What holds there, in mount, PID, network, IPC
  and UTS namespaces of its own (and a user namespace, but for root): other files and processes do not even exist.
- `landlock`. Needs Linux 5.13 with Landlock, libseccomp, and the packages landlockpy and pyseccomp. Files: the
  interpreter's library and installed packages can be read; nothing can be written, not even a temporary file. seccomp
  lets through a list of system calls: no sockets, no new processes or programs, no signals, no access to other
  processes, no shared memory, no io_uring; calls that later kernels add are shut out. As root, a worker first becomes a
  user of its own, without capabilities but that of reading the interpreter.
- `rlimits`. Any Unix, and the only one on macOS, by name only. The limits, an empty environment, a process of its own:
  for programs that you would run yourself.

Limits at every level, on each program: wall and CPU time, address space, threads and processes (root at level
`rlimits`: no), bytes written to files (none), open files, bytes printed. The program's process group is killed and
reaped before the next one starts. A worker that dies or does not answer in time is replaced and the others go on.

**Not covered.**
- Holes in the kernel, and side channels (timing, caches). Only a virtual machine is stronger; run one around the pool.
- The files that can be read: the interpreter's library and site-packages, with whatever secrets somebody put there.
- At level `landlock`, what a file's name tells: whether it exists, its size and times, where a link leads, and which
  process numbers are taken. No file is opened for it.
- The sum over workers: each may use its full memory limit at once. Set `Limits.memory` to what the machine can spare.
- At level `landlock`, as an ordinary user: the limit on threads counts all that this user runs, so a program that makes
  threads without end can keep other programs of the same user from making theirs until it is killed.
- The tests themselves are trusted with the judge's process, under the same lock: they come with the data set.
- What only an object's own process can tell. Arguments and results are copied, so a test that looks at how an argument
  was changed in place, or at the identity of a result, does not see it. An object that is no plain data is equal only
  to itself, and a test that asks whether it is true, or asks one of its methods, is told what the program likes. `in`
  goes through its items, so that a class with `__contains__` alone fails. Functions cannot be handed to the program.
- Level `rlimits` keeps no program from reading, from the network, from signals, or from processes that outlive it.
- Programs that ask for time, entropy or addresses may not behave the same twice; `random` and `hash` start the same.
"""

import atexit
import errno
import functools
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

from . import BadInput
from .sandbox_worker import decode, receive, send

LEVELS = ("bubblewrap", "landlock", "rlimits")  # strongest first
STATUSES = ("passed", "failed", "timed out", "out of memory", "killed", "refused", "output truncated")
WORKER = Path(__file__).with_name("sandbox_worker.py")


@dataclass(frozen=True)
class Limits:
    """Limits of one program. For standard input and output each case is a run of its own, with these limits.

    cpu: whole seconds; MBPP's slowest reference solution needs 3.6 to 4.7. wall: seconds, enough for two programs per
    core that use up their CPU time beside other work; more in proportion where a pool has more workers than that, so
    that crowding changes no verdict. memory: bytes of address space. output: bytes of standard output, or twice what is
    expected if that is more. threads: of one program, itself included.
    """

    wall: float = 30.0
    cpu: int = 8
    memory: int = 1 << 30
    output: int = 1 << 20
    open_files: int = 64
    threads: int = 64


@dataclass(frozen=True)
class Program:
    """A program and what decides about it: either tests or cases.

    source: the untrusted Python.
    tests: Python that the judge runs, outside the program's process, and that must reach its end; `names` stand for
    the program's objects of these names in it, and what it leaves in a variable `value` (plain data) is `Result.value`.
    setup: Python that the judge runs before.
    cases: pairs of standard input and expected standard output, compared token by token; all must agree.
    wall: seconds, where they are fewer than the pool's `Limits.wall`.
    """

    source: str
    tests: str = ""
    names: tuple[str, ...] = ()
    setup: str = ""
    cases: tuple[tuple[str, str], ...] = ()
    wall: float = math.inf


@dataclass(frozen=True)
class Result:
    """What became of a program. status: one of STATUSES; detail: one line of why, written by the program in part, so
    not to be trusted; seconds, cpu: wall and CPU time of all its runs; value: see `Program.tests`."""

    status: str
    detail: str = ""
    value: object = None
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all tests or cases passed."""
        return self.status == "passed"


class Sandbox:
    """A pool of workers at one level of isolation.

    level: "auto", the strongest of bubblewrap and landlock that works here, or one of LEVELS, which is then in force or
    refused. workers: programs that run at once, default two per core; each is kept to one core. Raises BadInput for a
    level that is not to be had. `level` is the level in force.
    """

    def __init__(self, level: str = "auto", workers: int | None = None, limits: Limits = Limits()) -> None:
        if level != "auto" and level not in LEVELS:
            raise BadInput(f"unknown sandbox {level!r}: choose auto, {', '.join(LEVELS)}")
        self._cores = list(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
        self.count = workers or 2 * len(self._cores)  # while one waits for its program, the other works
        self._crowd = max(1.0, self.count / (2 * len(self._cores)))
        self.limits = replace(limits, wall=limits.wall * self._crowd)
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        reasons = []
        for self.level in ("bubblewrap", "landlock") if level == "auto" else (level,):
            try:
                self._workers.append(self._start())
                break
            except (OSError, ImportError, RuntimeError) as error:  # a library that is missing is not an OSError
                reasons.append(f"{self.level}: {error}")
        else:
            raise BadInput(
                f"no sandbox {level!r} here ({'; '.join(reasons)}). Ask for a weaker one by name, "
                f"--sandbox {' or '.join(LEVELS[LEVELS.index(self.level) + 1:]) or 'on another system'}, or repair it"
            )
        self._workers += [self._start() for _ in range(self.count - 1)]
        atexit.register(self.close)

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """The result of each program, in order. Safe to call from several threads, which then take turns."""
        results: list[Result | None] = [None] * len(programs)
        pending = deque(enumerate(programs))
        lost: set[int] = set()  # programs whose worker died under them once
        with self._lock:
            while len(self._workers) < self.count:
                self._workers.append(self._start())
            idle, busy = list(self._workers), {}
            while pending or busy:
                while pending and idle:
                    worker, (index, program) = idle.pop(), pending.popleft()
                    worker.submit(program, self.limits)
                    busy[worker] = index
                first = min(worker.deadline for worker in busy) - time.monotonic()
                ready = wait([worker.jobs for worker in busy], max(first, 0))
                for worker, index in list(busy.items()):
                    late = time.monotonic() > worker.deadline
                    if worker.jobs not in ready and not late:
                        continue
                    del busy[worker]
                    result = worker.result() if worker.jobs in ready else None
                    if result is None:
                        self._workers.remove(worker)
                        worker.stop()
                        worker = self._start()
                        self._workers.append(worker)
                        if late:
                            result = Result("timed out", "the judge did not answer in time")
                        elif index in lost:
                            result = Result("killed", "the judge died twice")
                        else:
                            lost.add(index)
                            pending.appendleft((index, programs[index]))
                    results[index] = result
                    idle.append(worker)
        return results

    def close(self) -> None:
        """End all workers and wait for them."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        atexit.unregister(self.close)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> "_Worker":
        """A worker that has locked itself in, proven by a program that tries the lock. Raises OSError."""
        core = min(self._cores, key=[worker.core for worker in self._workers].count)
        worker = _Worker(self.level, self.limits, self._crowd, core)
        if self.level != "rlimits":
            worker.submit(PROBE, self.limits)
            result = worker.result()
            if result is None or not result.passed:
                worker.stop()
                raise OSError(f"the lock does not hold: {result and result.detail}")
        return worker


_pool: Sandbox | None = None


def shared(level: str | None = None) -> Sandbox:
    """The one pool of this process that the tasks use. The first call starts it, at the level named or else "auto"; a
    later call with another level replaces it. Raises BadInput."""
    global _pool
    if _pool is not None and level not in (None, _pool.level):
        _pool.close()
        _pool = None
    if _pool is None:
        _pool = Sandbox(level or "auto")
    return _pool


# Before a worker is used: every one of these must fail in it.
PROBE = Program(
    source="""
import os, socket
def attempts():
    done = []
    for attempt in (
        lambda: os.listdir("/"), lambda: open("/proc/self/environ"), lambda: open("/etc/passwd"),
        lambda: open("/tmp/probe", "w"), lambda: socket.socket(), lambda: os.kill(os.getppid(), 0), os.fork,
        lambda: os.execv("/bin/true", ["true"]),
    ):
        try:
            done.append(attempt())
        except OSError:
            pass
    return done
""",
    tests="assert attempts() == []",
    names=("attempts",),
)


# What CPython, NumPy and threads need. Everything else fails with ENOSYS: new processes, exec, sockets, signals to
# others, ptrace, reading another process's memory, mounts, namespaces, keys, io_uring, shared memory, memfd, links.
SYSTEM_CALLS = """
read write readv writev pread64 pwrite64 lseek close close_range fstat stat lstat newfstatat statx statfs fstatfs access
faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir flock dup dup2 dup3 pipe pipe2 poll
ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 fsync fdatasync umask
sendto recvfrom sendmsg recvmsg shutdown getsockopt getsockname getpeername
mmap munmap mremap mprotect madvise brk msync mincore membarrier mlock munlock
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause alarm
setitimer getitimer timer_create timer_settime timer_gettime timer_delete restart_syscall
futex set_robust_list get_robust_list rseq set_tid_address arch_prctl sched_yield sched_getaffinity sched_getparam
sched_getscheduler exit exit_group wait4 waitid
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid getpriority
uname sysinfo time times gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep getrusage getrlimit getrandom
getcpu
""".split()
OF_THE_FORK_SERVER = "clone kill setpgid memfd_create prctl seccomp setrlimit".split()
CLONE_THREAD = 0x00010000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # DUPFD, GETFD to SETFL, locks, DUPFD_CLOEXEC; SETOWN would send signals


@functools.cache
def _filters() -> dict[str, str]:
    """Two seccomp filters as hexadecimal arrays of struct sock_filter. `worker_filter` allows SYSTEM_CALLS and what the
    fork server needs, and files for reading only; `program_filter` takes the latter away."""
    import pyseccomp as seccomp

    worker = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    for name in SYSTEM_CALLS + OF_THE_FORK_SERVER:
        try:
            worker.add_rule(seccomp.ALLOW, name)
        except OSError:  # not a system call of this architecture
            pass
    for name, position in (("open", 1), ("openat", 2)):
        worker.add_rule(seccomp.ALLOW, name, seccomp.Arg(position, seccomp.MASKED_EQ, WRITING, 0))
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            worker.add_rule(seccomp.ERRNO(errno.EACCES), name, seccomp.Arg(position, seccomp.MASKED_EQ, flag, flag))
    for name in ("prlimit64", "sched_setaffinity"):  # of oneself
        worker.add_rule(seccomp.ALLOW, name, seccomp.Arg(0, seccomp.EQ, 0))
    for name, commands in (("ioctl", IOCTLS), ("fcntl", FCNTLS)):
        for command in commands:
            worker.add_rule(seccomp.ALLOW, name, seccomp.Arg(1, seccomp.EQ, command))
    worker.add_rule(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX))
    worker.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # look a call up in a tree

    program = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in OF_THE_FORK_SERVER:
        if name != "clone":
            program.add_rule(seccomp.ERRNO(errno.EPERM), name)
    program.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, 0))

    filters = {}
    for name, rules in {"worker_filter": worker, "program_filter": program}.items():
        with tempfile.TemporaryFile() as file:
            rules.export_bpf(file)
            file.seek(0)
            filters[name] = file.read().hex()
    return filters


def _packages() -> list[str]:
    """The folders of installed packages."""
    return [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]


def _readable() -> list[str]:
    """What a program may read: the interpreter, its libraries, installed packages, and three devices."""
    library = os.path.join(sys.base_prefix, "lib")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom"]
    paths = [library, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *_packages(), *system, *devices]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _ruleset(readable: list[str]):
    """A Landlock ruleset, for a worker to bind itself by: nothing but these paths can be opened, for reading; no TCP,
    no signals outside. Made here: with landlockpy in it, a worker would have a quarter more to copy at each fork."""
    from landlockpy import AccessFS, Ruleset, Scope

    ruleset = Ruleset(scoped=Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL)
    for path in readable:
        ruleset.allow_path(path, AccessFS.READ_FILE | (AccessFS.READ_DIR if os.path.isdir(path) else AccessFS.NONE))
    return ruleset


def _bubblewrap(readable: list[str]) -> list[str]:
    """The command that starts a worker in namespaces of its own, where nothing but its interpreter exists."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise OSError("bwrap is not installed")
    mounts = [*readable, sys.prefix, sys.base_prefix, str(WORKER)]
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--dev", "/dev", "--chdir", "/"]
    if os.geteuid() == 0:  # no user namespace, for the worker to become another user
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    for path in dict.fromkeys(path for path in mounts if not path.startswith("/dev/")):
        command += ["--ro-bind", path, path]
    return command


class _Worker:
    """One worker process of the pool and the socket to its judge."""

    def __init__(self, level: str, limits: Limits, crowd: float, core: int) -> None:
        self.crowd, self.core = crowd, core
        self.jobs, theirs = socket.socketpair()
        readable = _readable()
        isolated = level != "rlimits"
        descriptors = {"jobs": theirs} | ({"ruleset": _ruleset(readable)} if isolated else {})
        settings = {"isolated": isolated, "packages": _packages(), "core": core}
        settings |= {name: end.fileno() for name, end in descriptors.items()}
        settings |= vars(limits) | (_filters() if isolated else {})
        command = [sys.executable, "-B", "-s", str(WORKER), json.dumps(settings)]
        if level == "bubblewrap":
            command = _bubblewrap(readable) + command
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "LD_BIND_NOW": "1"}  # the whole of it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=environment, pass_fds=[end.fileno() for end in descriptors.values()], cwd="/",
        )
        for end in descriptors.values():
            end.close()
        self.deadline = time.monotonic() + 60
        try:
            hello = receive(self.jobs, self.deadline, loads=json.loads)
        except (EOFError, OSError, ValueError):
            hello = {"error": "the worker did not start"}
        if "error" in hello:
            self.process.stdin.close()
            said = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            self.stop()
            raise OSError(said[-1] if said else hello["error"])

    def submit(self, program: Program, limits: Limits) -> None:
        """Hand the worker a program; `deadline` is when it must have answered."""
        self.nonce = secrets.token_hex(16)  # an answer without it is not to this question
        wall = min(limits.wall, program.wall * self.crowd)
        job = {**vars(program), "cpu": limits.cpu, "output": limits.output, "wall": wall, "nonce": self.nonce}
        self.deadline = time.monotonic() + limits.wall * max(1, len(program.cases)) + 10
        try:
            self.jobs.settimeout(60)
            send(self.jobs, job)
        except OSError:
            pass  # `result` finds it dead

    def result(self) -> Result | None:
        """The worker's answer, or None if it is dead or late."""
        try:
            answer = receive(self.jobs, self.deadline, loads=json.loads)
            if not secrets.compare_digest(answer.pop("nonce"), self.nonce):
                return None
            answer["value"] = decode(answer["value"], None)
            return Result(**answer)
        except (EOFError, OSError, ValueError, TypeError):
            return None

    def stop(self) -> None:
        """End the worker: it kills and reaps its own children when its standard input closes."""
        self.jobs.close()
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()


if __name__ == "__main__":
    try:
        with Sandbox() as strongest:
            print(strongest.level)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
