"""The process of one program: a fresh child of the fork server, which runs it and answers its judge. Whatever is called
or read for the first time costs a page."""

import atexit
import contextlib
import errno
import gc
import marshal
import operator
import os
import resource
import sys
import threading
import types

from .codec import as_json, decode, encode

CHANNEL = 3  # the descriptor of the socket to the judge
TASKS = 63  # the descriptor of /proc/loadavg, where the limit on processes also counts others
open_descriptor = os.open  # which the worker replaces for programs
C_STACK = 64 << 20  # bytes: a recursion through `lru_cache` or `map` takes 500 a level, and contests raise the limit


def run(load_filter, limits: list[tuple[int, tuple[int, int]]], channel: int, stdout: int) -> None:
    """Run one program in this process, a freshly forked child, and end it. `channel` and `stdout` lead to the judge."""
    os.setpgid(0, 0)
    os.dup2(stdout, 1)
    os.dup2(channel, CHANNEL)
    os.dup2(open_descriptor(os.devnull, os.O_RDWR), 2)  # opened anew, without flags that the last program set
    os.closerange(CHANNEL + 1, TASKS)  # the judge's ends too: while it waits, the program must see the judge hang up
    job = marshal.loads(read_message())
    stdin = job["stdin"]
    redirect(stdin)
    set_limits(limits)
    load_filter()
    sys.set_int_max_str_digits(0)  # 2**20000 is printed as in any other language

    if "numpy" in job["source"]:
        with contextlib.suppress(ImportError):
            __import__("numpy").random.seed(0)  # as `random` is before the fork: the same verdict each time
    if "torch" in job["source"]:
        __import__("tempfile").tempdir = "/"  # dill, which torch imports, asks for one, though it writes nothing there
    code = compiled(job["source"])
    module = types.ModuleType("program" if stdin is None else "__main__")
    sys.modules[module.__name__] = module
    if stdin is None:
        serve(code, module.__dict__)
        os._exit(0)
    exit_code = 0
    try:
        exec(code, module.__dict__)
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
        module.__dict__.clear()  # others print it when their objects end: files that nobody closed, `__del__`
        gc.collect()
        for file in (sys.stdout, sys.__stdout__):
            if not file.closed:
                file.flush()
    except BaseException as error:
        write_message(error_of(error))
        exit_code = 1
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


def set_limits(limits: list[tuple[int, tuple[int, int]]]) -> None:
    """Set the resource limits, and with them the C stack. The one on tasks counts from what the user has now."""
    tasks = 0
    with contextlib.suppress(OSError):
        tasks = int(os.pread(TASKS, 99, 0).split()[3].partition(b"/")[2])  # now: the trainer may have started threads
    os.closerange(TASKS, TASKS + 1)
    for what, (soft, hard) in limits:
        if what == resource.RLIMIT_NPROC:
            soft = hard = min(soft + tasks, hard)
        resource.setrlimit(what, (soft, hard))
    resource.setrlimit(resource.RLIMIT_STACK, (C_STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))


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
        data = data[os.write(CHANNEL, data) :]


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
                args = [decode(item, dereference) for item in args]
                kwargs = {name: decode(item, dereference) for name, item in kwargs.items()}
                message = ["value", encode(function(*args, **kwargs), reference)]
        except BaseException as error:
            message = error_of(error)
        write_message(message)
        request = read_message()
        if not request:
            return


def fields(value) -> list | None:
    """Class and fields of a dataclass that compares by them, None of another object: the judge compares the lists."""
    kind = type(value)
    if not hasattr(kind, "__dataclass_fields__") or not kind.__dataclass_params__.eq:
        return None
    names = [name for name, field in kind.__dataclass_fields__.items() if field.compare]
    return [kind.__name__, [getattr(value, name) for name in names]]


OPERATIONS = {function.__name__: function for function in (getattr, setattr, iter, next, len, str, repr, bool, abs)}
OPERATIONS |= {"fields": fields, "isinstance": isinstance}
OPERATIONS |= {"enter": operator.methodcaller("__enter__"), "exit": operator.methodcaller("__exit__", *[None] * 3)}
OPERATORS = "lt le gt ge add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
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
