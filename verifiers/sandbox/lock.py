"""The lock on a worker: its rules, made by the pool, and how a worker puts itself under them. See `sandbox`. Functions
import what only the pool needs: every fork copies what a worker holds."""

import contextlib
import ctypes
import errno
import functools
import os
import signal
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)
# What CPython, NumPy and threads need. Everything else fails with ENOSYS: new processes, exec, sockets, signals to
# others, ptrace, reading another process's memory, mounts, namespaces, keys, io_uring, shared memory, memfd, links.
SYSTEM_CALLS = """
read write open openat readv writev pread64 pwrite64 lseek close close_range fstat stat lstat newfstatat statx statfs
fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir dup dup2 dup3 pipe pipe2 poll
ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 fsync fdatasync umask
recvfrom recvmsg shutdown getsockopt getsockname getpeername mmap munmap mremap mprotect madvise brk msync mincore
membarrier mlock munlock rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend
sigaltstack pause alarm setitimer getitimer restart_syscall futex set_robust_list get_robust_list rseq set_tid_address
arch_prctl sched_yield sched_getaffinity sched_getparam sched_getscheduler exit exit_group wait4 waitid getpid getppid
gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid getpriority uname sysinfo
time times gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep getrusage getrlimit getrandom getcpu
""".split()
OF_THE_FORK_SERVER = "clone kill setpgid memfd_create prctl seccomp setrlimit sendmsg".split()
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD to SETFL, DUPFD_CLOEXEC; SETOWN would send signals


@functools.cache
def filters() -> dict[str, str]:
    """Two seccomp filters as hexadecimal arrays of struct sock_filter. `worker_filter` allows SYSTEM_CALLS and what the
    fork server needs, files for writing among it; `program_filter` takes the latter away."""
    import tempfile

    import pyseccomp as seccomp

    worker = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    for name in SYSTEM_CALLS + OF_THE_FORK_SERVER:
        with contextlib.suppress(OSError):  # not a system call of this architecture
            worker.add_rule(seccomp.ALLOW, name)
    worker.add_rule(seccomp.ALLOW, "prlimit64", seccomp.Arg(0, seccomp.EQ, 0))  # of oneself
    worker.add_rule(seccomp.ALLOW, "sendto", seccomp.Arg(4, seccomp.EQ, 0))  # without an address
    for name, commands in (("ioctl", IOCTLS), ("fcntl", FCNTLS)):
        for command in commands:
            worker.add_rule(seccomp.ALLOW, name, seccomp.Arg(1, seccomp.EQ, command))
    stream = seccomp.Arg(1, seccomp.MASKED_EQ, 0xF, socket.SOCK_STREAM)  # datagrams could go to any socket with a path
    worker.add_rule(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX), stream)
    worker.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # look a call up in a tree

    program = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in sorted({*OF_THE_FORK_SERVER} - {"clone"}):
        program.add_rule(seccomp.ERRNO(errno.EPERM), name)
    for name, position in (("open", 1), ("openat", 2)):
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            program.add_rule(seccomp.ERRNO(errno.EACCES), name, seccomp.Arg(position, seccomp.MASKED_EQ, flag, flag))
    program.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, 1 << 16, 0))  # CLONE_THREAD

    filters = {}
    for name, rules in {"worker_filter": worker, "program_filter": program}.items():
        with tempfile.TemporaryFile() as file:
            rules.export_bpf(file)
            file.seek(0)
            filters[name] = file.read().hex()
    return filters


def packages() -> list[str]:
    """The folders of installed packages."""
    return [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]


def readable() -> list[str]:
    """What a program may read: the interpreter, its libraries, installed packages, and three devices."""
    import sysconfig

    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    system += [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/dev/null", "/dev/zero", "/dev/urandom"]
    paths = [os.path.join(sys.base_prefix, "lib"), *packages(), *system]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def ruleset(readable: list[str]):
    """A Landlock ruleset for a worker to bind itself by: only these paths can be opened, for reading. Newer kernels
    refuse TCP and signals outside. Made here: with landlockpy, a worker would copy a quarter more at each fork."""
    from landlockpy import AccessFS, Ruleset, Scope

    ruleset = Ruleset(scoped=Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL)
    for path in readable:
        access = AccessFS.READ_FILE | (AccessFS.READ_DIR if os.path.isdir(path) else AccessFS.NONE)
        if path == os.devnull:  # which the fork server opens; programs open nothing for writing
            access |= AccessFS.WRITE_FILE
        ruleset.allow_path(path, access)
    return ruleset


def bubblewrap(readable: list[str]) -> list[str]:
    """The command that starts a worker in namespaces of its own, where nothing but its interpreter exists."""
    import shutil

    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise OSError("bwrap is not installed")
    mounts = [*readable, sys.prefix, sys.base_prefix, os.path.dirname(os.path.abspath(__file__))]
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--dev", "/dev", "--chdir", "/"]
    # For root no user namespace, for the worker to become another user.
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.geteuid() == 0 else ["--unshare-user"]
    for path in dict.fromkeys(path for path in mounts if not path.startswith("/dev/")):
        command += ["--ro-bind", path, path]
    return command


def unprivileged_user() -> bool:
    """As root, become a user who owns nothing: limits on processes do not bind root. Kept is the capability to read,
    under Landlock's rules, an interpreter installed in root's home. Returns whether no other process has that user."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their high words
    libc.capget(header, sets)
    kept = sets[1] & 1 << 2 or sets[1] & 1 << 1  # CAP_DAC_READ_SEARCH, else CAP_DAC_OVERRIDE
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    for user in (1_500_000_000 + os.getpid(), 65534):  # a container may know only the first 65536
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            break
    if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
    return user != 65534


def restrict_files(ruleset: int) -> None:
    """From here on a Landlock ruleset, given as a descriptor, binds this process and its children; see `sandbox`."""
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):  # PR_SET_NO_NEW_PRIVS, landlock_restrict_self
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(ruleset)


def filter_loader(instructions: bytes):
    """A function that puts this process under a seccomp filter (sock_filter[]) and, at its parent's end, ends it."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    filter_program = ctypes.byref(Program(len(instructions) // 8, instructions))

    def load(at_parents_end: int = signal.SIGKILL) -> None:
        libc.prctl(1, at_parents_end, 0, 0, 0)  # PR_SET_PDEATHSIG
        if libc.prctl(22, 2, filter_program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            raise OSError(ctypes.get_errno(), "seccomp")

    return load
