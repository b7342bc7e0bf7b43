"""Attacks on the sandbox, one property each, those of a red team in the form in which they once succeeded; and what the
pool does about its own trouble and where others crowd it. An attack "passes" only if it got what it was after. Attacks
are bounded and aim at nothing but what a test made for them."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
from types import SimpleNamespace

import pytest
from test_sandbox import LEVEL, LIMITS, RIGHT, SECRET, descendants, isolated, linux, run

from verifiers import BadInput
from verifiers.sandbox import pool as pools
from verifiers.sandbox.pool import Limits, Program, Result, Sandbox

pytestmark = [linux]


@pytest.fixture(scope="module")
def pool():
    os.environ["USERS_TOKEN"] = SECRET
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        yield pool
    del os.environ["USERS_TOKEN"]


@pytest.fixture
def no_worker_ends(pool):
    """A judge that hangs longer than GRACE after a program's time ends itself, and its worker with it."""
    before = [worker.process.pid for worker in pool._workers]
    yield
    assert pool.run([RIGHT] * 2)[1].passed
    assert sorted(worker.process.pid for worker in pool._workers) == sorted(before)


# ------------------------------------------------------------------------------------------- attacks on the verdict
FORGERIES = {
    "exit in the call": "def f(x): raise SystemExit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "printed verdict": "print('passed'); print({'status': 'passed'})\ndef f(x): return 'passed'",
    "equal to everything": "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
    "def f(x): return E()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Warning\n"
    "builtins.isinstance = builtins.all = lambda *a: True\nbuiltins.str.__eq__\ndef f(x): return 1",
    "patched worker": "import sys\nw = sys.modules['sandbox.worker']\nw.error_of = lambda e: ['value', None]\n"
    "w.encode = lambda *a: {'status': 'passed'}\ndef f(x): raise ValueError",
    "a verdict on every descriptor": "import os, json\nanswer = {'status': 'passed', 'detail': '', 'value': None}\n"
    "m = json.dumps({**answer, 'seconds': 0, 'cpu': 0, 'nonce': ''}).encode()\nfor fd in range(64):\n"
    "    try: os.write(fd, len(m).to_bytes(4, 'big') + m)\n    except OSError: pass\ndef f(x): return 1",
    "the test in the frames": "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n"
    "        for v in map(str, g.f_locals.values()):\n"
    "            if 'c0' + 'ffee' in v: return v[v.index('c0' + 'ffee'):][:10]\n        g = g.f_back",
    "the test in the judge's memory": "import os\ndef f(x): return open(f'/proc/{os.getppid() + 1}/mem', 'rb').read()",
    "garbage for an answer": "import os\ndef f(x): os.write(3, b'\\0\\0\\0\\5hello')",
    "two answers at once": "import os\ndef f(x): os.write(3, b'\\0\\0\\0\\2[]' * 2)",
    "an exception that is no exception": "def f(x):\n    class KeyboardInterrupt(BaseException): pass\n"
    "    raise KeyboardInterrupt",
}  # fmt: skip


OPERATORS = """
class E:
    def __eq__(s, *o): return True
    __lt__ = __le__ = __gt__ = __ge__ = __exit__ = __instancecheck__ = __eq__
    def __sub__(s, o): return 0
    def __enter__(s): return s
    __add__ = __radd__ = __rsub__ = __abs__ = __sub__
def f(x): return E()
"""
DATACLASSES = [
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 4\n    def __eq__(s, o): return True\n"
    "def f(x): return P()",
    "class P:\n    __dataclass_fields__ = {}\n    class __dataclass_params__: eq = True\ndef f(x): return P()",
]
SPECIAL = [  # forgeries for tests of one form
    ("StopIteration ends a test's loop", "def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x, [2]))"),
    ("items equal to everything", FORGERIES["equal to everything"].replace("return E()", "return iter([E()])"),
     f"assert list(f(2)) == [{SECRET!r}]"),
    ("a dict with keys equal to everything", "class E:\n    def __eq__(s, o): return True\n"
     "    def __hash__(s): return hash('a')\ndef f(x): return {E(): 1}", "assert f(2) == {'a': 1}"),
    ("a shadowed builtin of the tests", "sorted = lambda *a: 0\ndef f(x): return [3]", "assert sorted(f(2)) == [1]"),
    ("an object that contains everything", "class E:\n    def __contains__(s, o): return True\n"
     "    def __iter__(s): return iter(E)\ndef f(x): return E()", f"assert {SECRET!r} in f(2)"),
    ("a test that forgives everything", "import os\ndef f(x): os._exit(0)", "try: f(2)\nexcept BaseException: pass"),
    *(("an operator that could tell what is expected", OPERATORS, tests) for tests in (
        f"assert f(2) <= {SECRET!r}", f"assert {SECRET!r} - f(2) == 0", f"with f(2) as x:\n    assert x == {SECRET!r}",
        f"assert isinstance({SECRET!r}, f(2))")),
    *(("an object equal to plain data", source, f"assert f(2) == {data}")
      for source in DATACLASSES for data in ("4", "['P', [4]]", "None")),
]  # fmt: skip


@pytest.mark.parametrize("forgery", [*FORGERIES.items(), *SPECIAL], ids=lambda forgery: forgery[0])
def test_forgery_does_not_pass(pool, forgery):
    result = run(pool, *forgery[1:])
    assert result.status in ("failed", "refused", "killed"), result


# --------------------------------------------------------------------------------------- attacks on time and memory
RAW = """
import json, os
def f(x):
    data = json.dumps(["value", {}]).encode()
    data = len(data).to_bytes(4, "big") + data
    while data: data = data[os.write(3, data):]
"""


@pytest.mark.parametrize("source, status, wall", [
    ("while True: pass", "timed out", 3), ("import time\ndef f(x): time.sleep(600)", "timed out", 0.7),
    ("import signal as s\ns.signal(s.SIGXCPU, s.SIG_IGN)\ndef f(x):\n    while True: pass", "timed out", 3),
    ("class E:\n    def __iter__(s): return s\n    def __next__(s): return 1\ndef f(x): return E()", "timed out", 0.7),
    # bytes, whose pages are not touched: to fill the memory takes a slow machine longer than the CPU limit
    ("def f(x):\n    a = []\n    while True: a.append(bytes(1 << 20))", "out of memory", 3),
    ("def f(x): return f(x)", "failed", 3), ("import os\ndef f(x): os.abort()", "killed", 3),
    ("def f(x): return 'x' * (20 << 20)", "output truncated", 3),
    ("import sys\nwhile True: sys.stderr.write('x' * 10000); sys.stdout.write('x' * 10000)", "timed out", 3),
    # late answers one after the other do not add up
    ("import time\nclass E:\n    def __iter__(s): time.sleep(60)\ndef f(x):\n    time.sleep(1.6)\n    return E()",
     "timed out", 2),
    # answers that fill the judge, or keep it busy
    (RAW.replace("{}", "['fractions.Fraction', ['1e999999999', 1]]"), "failed", 3),
    (RAW.replace("{}", "['set', [['int', hex((2**61 - 1) * i)] for i in range(10**5)]]"), "timed out", 0.7),
    (RAW.replace("{}", "['builtins.range', [0, 10**8, 1]]"), "out of memory", 3),  # a list of it would be
])  # fmt: skip
def test_time_and_memory_are_bounded(pool, no_worker_ends, source, status, wall):
    assert run(pool, source, f"assert list(f(2)) == {SECRET!r}", wall=wall).status == status


@pytest.mark.parametrize("make, most", [("threading.Thread(target=wait, daemon=True).start()", 700),
                                        ("os.open('/dev/null', os.O_RDONLY)", 64)])  # fmt: skip
def test_threads_and_open_files_are_bounded_and_end_no_worker(pool, no_worker_ends, make, most):
    """An ordinary user's own threads count, whatever process they are of, and may end meanwhile."""
    source = f"""
import os, threading, time
wait = threading.Event().wait
threading.stack_size(1 << 16)
def f():
    for made in range(2000):
        try: {make}
        except (OSError, RuntimeError): break
    time.sleep(0.5)
    return made
"""
    result, *beside = pool.run([Program(source, "value = f()", ("f",)), *[RIGHT] * 30])
    assert result.passed and 1 <= result.value < most and all(right.passed for right in beside)


# --------------------------------------------------------------------------------------------- attacks on the machine
@pytest.fixture
def others(tmp_path):
    """What is not the program's, and stays as it is: the path of a file, the number of a process, the port of a server,
    the path of a socket that any user may reach."""
    file = tmp_path / "private"
    file.write_text(SECRET)
    before, process = file.stat(), subprocess.Popen(["sleep", "60"])
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside,
    ):
        outside.bind(f"{folder}/socket")
        os.chmod(folder, 0o777), os.chmod(f"{folder}/socket", 0o777)
        yield str(file), process.pid, server.getsockname()[1], f"{folder}/socket"
        server.setblocking(False), outside.setblocking(False)
        for look in (server.accept, lambda: outside.recv(1)):
            with pytest.raises(BlockingIOError):
                look()
    assert process.poll() is None
    process.kill(), process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["private"] and file.read_text() == SECRET
    assert (file.stat().st_mode, file.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


ATTACK = """
import ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    result = libc.syscall(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def f(path, pid, port, outside):
    {attack}
    return "done"
"""
OUTSIDE = "socket.socketpair(1, socket.SOCK_{})[0].send{}"
RUN = """page = mmap.mmap(-1, 4096, prot=7); page.write(bytes.fromhex("{}"))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() or os._exit(0)"""
ATTACKS = {
    "the network": [
        "socket.create_connection(('127.0.0.1', port), 1)", "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
        *(OUTSIDE.format(kind, way) for kind in ("DGRAM", "STREAM", "SEQPACKET")
          for way in ("to(b'x', outside)", "msg([b'x'], [], 0, outside)")),
        "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",  # in flight, they count against all of a user's own
    ],
    "new processes": [
        "os.fork() or os._exit(0)", "call(58) or os._exit(0)",  # vfork
        "call(435, ctypes.create_string_buffer(88), 88)",  # clone3
        "subprocess.run(['true'])", "os.execv(sys.executable, ['python', '-c', ''])",
    ],
    "locks on shared files": ["fcntl.flock(2, 2)", "fcntl.lockf(0, 1)", "os.lockf(2, 1, 0)"],
    # mov eax, 2 (i386's fork); int 0x80; ret. And mov eax, 0x40000039 (x32's fork); syscall; ret
    "another way into the kernel": [RUN.format(code) for code in ("b802000000cd80c3", "b8390000400f05c3")],
    "calls that nobody needs": ["os.sched_setaffinity(0, range(64))",
                                "call(222, 0, None, ctypes.create_string_buffer(8))"],  # timer_create
    "files": [
        "open(path).read()", "os.listdir(os.path.dirname(path))", "open(path, 'a').write('x')",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)", "os.truncate(path, 0)", "os.remove(path)",
        "os.rename(path, path + '2')", "os.chmod(path, 0)", "os.utime(path)", "os.link(path, path + '2')",
        "os.symlink(path, path + '2')", "open(path + '2', 'w')", "os.mkdir(path + '2')", "os.mkfifo(path + '2')",
        "tempfile.TemporaryFile()", "open('/dev/shm/sandbox-attack', 'w')", "os.memfd_create('a')", "os.chroot('/tmp')",
    ],
    "the user's environment": ["os.environ['USERS_TOKEN']", "assert libc.getenv(b'USERS_TOKEN')",
                               "open(f'/proc/{os.getppid()}/environ')"],
    "other processes": [
        "os.kill(pid, 9)", "os.killpg(os.getpgid(pid), 0)", "signal.pidfd_send_signal(os.pidfd_open(pid), 9)",
        "call(234, pid, pid, 9)", "call(101, 16, pid, 0, 0)", "call(310, pid, None, 0, None, 0, 0)",
        "resource.prlimit(pid, 7, (3, 3))", "os.sched_setaffinity(pid, {0})", "os.setpriority(0, pid, 19)",
        "fcntl.fcntl(0, 8, pid)",
    ],
    "privileges": [  # by number: unshare, io_uring, bpf, seccomp, prctl, keyctl, shmget, open_by_handle_at
        "os.setuid(0)", "os.setgroups([0])", "call(272, 0x10000000)", "call(425, 4, None)", "call(321, 0, None, 0)",
        "call(317, 1, 0, None)", "call(157, 38, 0, 0, 0, 0)", "call(250, 0, 0, 0, 0, 0)",
        "call(29, 0, 4096, 0o1600)", "call(304, 0, None, 0)", "resource.setrlimit(0, (60, 60))",
        "resource.setrlimit(9, (1 << 40, 1 << 40))",
    ],
}  # fmt: skip
# for under bubblewrap the file and the process do not even exist
NOT_THERE = "FileNotFoundError ProcessLookupError KeyError AssertionError ValueError".split()


@isolated
@pytest.mark.parametrize("what, attack", [(what, attack) for what, attacks in ATTACKS.items() for attack in attacks])
def test_what_is_not_the_programs_is_out_of_its_reach(pool, others, what, attack):
    by_number = "call(" in attack or "mmap" in attack
    if by_number and os.uname().machine != "x86_64":
        pytest.skip("system calls by their x86-64 numbers")
    result = run(pool, ATTACK.replace("{attack}", attack), f"assert f(*{others!r}) == 'done'")
    not_there = result.status == "failed" and result.detail.partition(":")[0] in NOT_THERE
    assert result.status == ("killed" if "mmap" in attack else "refused") or not_there, result


def test_a_program_leaves_nothing_to_the_next(pool):
    patch = """
import builtins, fcntl, json, math, os
builtins.sum = math.sqrt = json.dumps = lambda *args, **kwargs: 0
builtins.mark = 1
for fd in range(3): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
"""
    look = """
import builtins, fcntl, json, math
def f(x): return [sum(x), math.sqrt(4), json.dumps(1), hasattr(builtins, "mark")], [flags(fd) for fd in range(3)]
def flags(fd): return fcntl.fcntl(fd, fcntl.F_GETFL)
"""
    look = Program(look, "value = f([1, 2])\nassert value[0] == [3, 2.0, '1', False]", ("f",))
    before, *patched, one, other = pool.run([look, *[Program(patch)] * 4, look, look])
    assert {result.status for result in patched} == {"failed"}  # they cannot answer: nothing that they did was refused
    assert before.passed and one.passed and other.passed and before.value == one.value == other.value


def test_a_program_holds_no_descriptors_but_its_own_and_one_core(pool):
    source = "import os\ndef f(): return [*filter(os.path.exists, range(64))], len(os.sched_getaffinity(0))"
    assert run(pool, source, "assert f() == ([0, 1, 2, 3], 1)").passed


# ------------------------------------------------------------------------------------------------------- one verdict
def test_tests_that_do_not_end_cost_one_response(pool):
    """What is slow in one step of the judge, here a set of colliding numbers, ends it: in one program's time."""
    source = "def f(x): return [(2**61 - 1) * i for i in range(3 * 10**4)]"
    results = pool.run([Program(source, "assert len(set(f(2))) == 1", ("f",), wall=2), *[RIGHT] * 10])
    assert (results[0].status, results[0].detail) == ("timed out", "the tests did not end in time")
    assert all(result.passed for result in results[1:])


@pytest.mark.parametrize("source, status", [
    ("os.close(3)\nos._exit(0)", "failed"), ("os.close(3)\nos.abort()", "killed"),
    ("os.close(3)\ntime.sleep(0.01)\nos._exit(0)", "failed"), ("os.close(3)\ntime.sleep(60)", "timed out"),
    ("os.close(3)\nwhile True: pass", "timed out"),
    ("print(3, flush=True)\nos.close(1)\nos.close(3)\nos._exit(0)", "passed"),
    ("print(3, flush=True)\nos.close(3)\nos.close(1)\ntime.sleep(0.01)\nos._exit(1)", "failed"),
    (RAW.replace("{}", "None") + "print(3, flush=True)\nf(1)", "failed"),
])  # fmt: skip
def test_a_program_that_hangs_up_has_one_status(pool, no_worker_ends, source, status):
    judged_by = {"cases": (("", "3"),)} if "print" in source else {"tests": "assert f(2) == 4", "names": ("f",)}
    wall, count = (0.7 if "sleep(60)" in source else 3.0), 1 if status == "timed out" else 10
    programs = [Program("import os, time\n" + source, wall=wall, **judged_by)] * count
    assert {result.status for result in pool.run(programs)} == {status}


@pytest.mark.parametrize("program, detail", [
    (Program("print(3)", cases=(("", "4"),)), "printed 3, expected 4"),
    (Program("print(1, 2)", cases=(("", "1"),)), "printed 2, expected nothing"),
    (Program("", cases=(("", "4"),)), "printed nothing, expected 4"),
    (Program("print(3)\nraise ValueError('no')", cases=(("", "3"),)), "ValueError: no"),
    (Program("def f(x): return 3", "assert f(2) == 4, f'{f(2)} is not 4'", ("f",)), "AssertionError: 3 is not 4"),
    (Program("import json\ndef f(x): json.loads('')", "f(2)", ("f",)),
     "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
])  # fmt: skip
def test_what_a_failure_says(pool, program, detail):
    (result,) = pool.run([program])
    assert (result.status, result.detail) == ("failed", detail)


@pytest.mark.parametrize("body", ["os._exit(1)", "return 7", "raise KeyboardInterrupt"])
def test_an_object_that_cannot_be_shown_ends_no_worker(pool, no_worker_ends, body):
    source = f"import os\nclass A:\n    def __str__(self): {body}\ndef f(x): return A()"
    assert run(pool, source, "assert f(2) == 4, f(2)").status == "failed"


# ---------------------------------------------------------------------------------------------- the pool's own trouble
def test_a_pool_that_cannot_replace_a_worker_says_why(pool, monkeypatch, tmp_path):
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(pools, "FOLDER", tmp_path)
        with pytest.raises(BadInput, match="no sandbox worker at level .*: .*No module named 'sandbox'"):
            pool.run([RIGHT] * 3)
    assert all(result.passed for result in pool.run([RIGHT] * 3))


def test_a_module_that_only_the_tests_need_is_nobodys_failure(pool):
    tests = "import no_such_module\nassert f(1) == 1"
    with pytest.raises(BadInput, match="need a module: No module named 'no_such_module'"):
        pool.run([RIGHT, Program(RIGHT.source, tests, ("f",)), *[RIGHT] * 3])
    assert run(pool, "import no_such_module", "f(1)").status == "failed"
    assert all(result.passed for result in pool.run([RIGHT] * 3))


def test_a_pool_that_is_interrupted_answers_the_next_question(pool, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pools, "wait", lambda *_: signal.default_int_handler(signal.SIGINT, None))
        with pytest.raises(KeyboardInterrupt):
            pool.run([RIGHT] * 3)
    wrong = Program("def f(x): return -x", "assert f(1) == 1", ("f",))
    assert [result.status for result in pool.run([wrong, RIGHT, wrong])] == ["failed", "passed", "failed"]


def test_each_case_has_its_own_time():
    """And all cases together have as much as four."""
    with Sandbox(LEVEL, workers=1, limits=Limits(wall=1, cpu=1)) as pool:
        pid = pool._workers[0].process.pid
        slow, late = (f"import time\ntime.sleep({seconds})\nprint(3)" for seconds in (0.6, 9))
        assert pool.run([Program(slow, cases=(("", "3"),) * 4)])[0].passed  # longer than one case's time and GRACE
        assert pool.run([Program(late, cases=(("", "3"),) * 4)])[0].status == "timed out"
        (result,) = pool.run([Program(slow, cases=(("", "3"),) * 20)])
        assert result.status == "timed out" and 4 <= result.wall < 9 and result.cpu < 2
        assert pool._workers[0].process.pid == pid


# ------------------------------------------------------------------------------------------------------------ crowding
def test_what_runs_again(pool, monkeypatch):
    """What timed out with less than half its wall time of CPU time, if others ran: for a sixteenth, a quarter, all. All
    this takes no longer than the first runs did."""
    late, passed, runs, now, seconds = Result("timed out", wall=2, cpu=0.9), Result("passed"), [], [0.0], [0.01]
    first = [late, Result("timed out", wall=2, cpu=1.1), passed, late, Result("failed"), Result("timed out")]

    def results(programs):
        runs.append([(int(program.source), program.wall) for program in programs])
        now[0] += 0.5 if len(runs) == 1 else seconds[0]
        again = passed if runs[-1] in ([(3, 1.0)], [(5, 1 / 16)]) else late
        return first[: len(programs)] if len(runs) == 1 else [again]

    monkeypatch.setattr(pool, "_results", results)
    monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: now[0]))
    programs = [Program(str(i), wall=1.0) for i in range(6)]
    assert pool.run(programs) == [late, first[1], passed, passed, first[4], passed]
    again = [(0, 1 / 16), (3, 1 / 16), (5, 1 / 16), (0, 1 / 4), (3, 1 / 4), (0, 1.0), (3, 1.0)]
    assert runs[1:] == [[pair] for pair in again]
    runs.clear()
    assert pool.run(programs[:1]) == [late] and len(runs) == 1
    runs.clear()
    seconds[0] = 0.3
    assert pool.run(programs)[5] == first[5] and runs[1:] == [[pair] for pair in again[:2]]


def test_threads_that_the_trainer_starts_later_take_none_from_programs(pool):
    """As an ordinary user, at a level without user namespaces, the system counts them all together."""
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(70)]
    source = "import threading as m\ndef f(x):\n    t = m.Thread(target=print)\n    t.start(), t.join()\n    return x"
    try:
        [thread.start() for thread in threads]
        results = pool.run([Program(source, "assert f(1) == 1", ("f",))] * 4)
    finally:
        stop.set()
    assert [result.status for result in results] == ["passed"] * 4


def test_workers_are_what_the_system_kills_where_memory_runs_out(pool):
    assert pool.run([RIGHT])[0].passed
    scores, worker = [], pool._workers[0].process.pid
    for pid in (worker, *descendants(worker)):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj") as file:
            scores.append(int(file.read()))
    assert len(scores) >= 2 and set(scores) == {1000}


def test_the_weakest_level_still_judges_and_bounds():
    with Sandbox("rlimits", workers=1, limits=LIMITS) as pool:
        assert pool.level == "rlimits" and pool.run([RIGHT])[0].passed
        for name in ("os._exit in the call", "equal to everything", "patched builtins"):
            assert run(pool, FORGERIES[name]).status == "failed"
        assert run(pool, "def f(x):\n    while True: pass").status == "timed out"
