"""Attacks of a red team on the sandbox that once succeeded, each in the form in which it did, and what they did to the
pool. `test_sandbox.py` has the others. SANDBOX=<level> runs the suite at a level other than the strongest.
"""

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time

import pytest
from test_sandbox import LEVEL, LIMITS, SECRET, SYSCALL, descendants, isolated, linux, run

from verifiers import BadInput
from verifiers.sandbox import pool as pools
from verifiers.sandbox.pool import Limits, Program, Result, Sandbox

pytestmark = [linux]
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by their x86-64 numbers")
RIGHT = Program("def f(x): return x", "assert f(1) == 1", ("f",))


@pytest.fixture(scope="module")
def pool():
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        yield pool


@pytest.fixture
def alone():
    """One worker, so that one program is judged after the other."""
    with Sandbox(LEVEL, workers=1, limits=LIMITS) as pool:
        yield pool


@pytest.fixture
def no_worker_ends(pool):
    """A judge that hangs longer than GRACE after a program's time ends itself, and its worker with it."""
    before = [worker.process.pid for worker in pool._workers]
    yield
    assert pool.run([RIGHT] * 2)[1].passed
    assert sorted(worker.process.pid for worker in pool._workers) == sorted(before)


# ------------------------------------------------------------------------------------------------------ false passes

DRAWN = "import random\nfor _ in range(5):\n    y = random.random()\n    assert f(y / 2) == y"


@pytest.mark.parametrize("source", [
    "import random\ndef f(x): return random.random()",
    "import random\nown = random.Random(0)\ndef f(x): return own.random()",
])  # fmt: skip
def test_what_tests_draw_is_not_what_programs_draw(alone, source):
    assert run(alone, "def f(x): return 2 * x", DRAWN).passed
    for _ in range(2):
        assert run(alone, source, DRAWN).status == "failed"
    with Sandbox(LEVEL, workers=1, limits=LIMITS) as fresh:
        assert run(fresh, source, DRAWN).status == "failed"


@pytest.mark.parametrize("module, draw", [("random", "random.random()"), ("numpy", "float(numpy.random.random())")])
def test_a_verdict_does_not_depend_on_what_was_judged_before(alone, module, draw):
    pytest.importorskip(module)
    of_tests = [Program(f"x = {i}", f"import {module}\nvalue = {draw}") for i in (1, 2, 1)]
    of_program = [Program(f"import {module}\ndef f(): return {draw}", "value = f()", ("f",))] * 2
    first, other, again, program, program_again = (result.value for result in alone.run([*of_tests, *of_program]))
    assert first == again != other and program == program_again != first and first is not None
    with Sandbox(LEVEL, workers=1, limits=LIMITS) as fresh:
        assert fresh.run(of_tests[:1])[0].value == first


@pytest.mark.parametrize("source", [
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 4\n    def __eq__(s, o): return True\n"
    "def f(x): return P()",
    "class P:\n    __dataclass_fields__ = {}\n    class __dataclass_params__: eq = True\ndef f(x): return P()",
])  # fmt: skip
@pytest.mark.parametrize("expected", ["4", "['P', [4]]", "None"])
def test_an_object_is_never_equal_to_plain_data(pool, source, expected):
    assert run(pool, source, f"assert f(2) == {expected}").status == "failed"


# --------------------------------------------------------------------------------------------------------- ways out


@isolated
def test_no_datagram_reaches_a_socket_outside(pool):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside:
        outside.bind(f"{folder}/socket")
        os.chmod(folder, 0o777), os.chmod(f"{folder}/socket", 0o777)  # any user may reach it
        outside.settimeout(0.1)
        for kind in ("DGRAM", "STREAM", "SEQPACKET"):
            start = f"import socket\ndef f(x):\n    a, b = socket.socketpair(1, socket.SOCK_{kind})\n    "
            for attack in (f"a.sendto(b'x', '{folder}/socket')", f"a.sendmsg([b'x'], [], 0, '{folder}/socket')"):
                assert run(pool, start + attack, "assert f(2) is None").status == "refused", (kind, attack)
        with pytest.raises(TimeoutError):
            outside.recv(1)


@isolated
def test_no_descriptors_in_flight(pool, no_worker_ends):
    """As an ordinary user, some hundreds of them would be all that the user's other processes may send."""
    source = """
import os, socket
def f(x):
    pairs = [socket.socketpair() for _ in range(8)]
    for a, b in pairs:
        try:
            for _ in range(100): socket.send_fds(a, [b"x"], [0] * 250)
        except BlockingIOError: pass
    import time; time.sleep(0.5)
"""
    results = pool.run([Program(source, "assert f(2) is None", ("f",)), *[RIGHT] * 30])
    assert results[0].status == "refused" and all(result.passed for result in results[1:])


@pytest.mark.parametrize("attack", ["fcntl.flock(2, 2)", "fcntl.lockf(0, 1)", "os.lockf(2, 1, 0)"])
@isolated
def test_no_locks_on_shared_files(pool, attack):
    source = f"import os, fcntl\ndef f(x):\n    {attack}\n    return 'done'"
    assert run(pool, source, "assert f(2) == 'done'").status == "refused"


def test_no_flag_of_a_descriptor_is_left_to_the_next_program(alone):
    patch = "import os, fcntl\nfor fd in range(3): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)"
    look = "import fcntl\ndef f(): return [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in range(3)]"
    programs = [Program(look, "value = f()", ("f",)), Program(patch, "pass"), Program(look, "value = f()", ("f",))]
    before, patched, after = alone.run(programs)
    assert before.value == after.value and len(after.value) == 3 and patched.passed


def test_a_program_holds_no_descriptors_but_its_own(pool):
    source = """
import os
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
def f(): return [*filter(is_open, range(64))]
"""
    assert run(pool, source, "assert f() == [0, 1, 2, 3]").passed


@pytest.mark.parametrize("attack", [
    "os.sched_setaffinity(0, range(64))",
    pytest.param("call(222, 0, None, ctypes.create_string_buffer(8))", marks=x86_64),  # timer_create
])  # fmt: skip
@isolated
def test_no_call_that_nobody_needs(pool, attack):
    result = run(pool, SYSCALL + f"def f(x):\n    {attack}\n    return 'done'", "assert f(2) == 'done'")
    assert result.status == "refused"
    assert run(pool, "import os\ndef f(): return len(os.sched_getaffinity(0))", "assert f() == 1").passed


# ------------------------------------------------------------------------------------------------- denial of service

RAW = """
import json, os
def f(x):
    data = json.dumps(["value", {}]).encode()
    data = len(data).to_bytes(4, "big") + data
    while data: data = data[os.write(3, data):]
"""


@pytest.mark.parametrize("reply, status", [
    ("['fractions.Fraction', ['1e999999999', 1]]", "failed"), ("['decimal.Decimal', '1e999999999']", "failed"),
    ("['int', 'f' * 10**7]", "failed"), ("{str(i): i for i in range(10**5)}", "failed"),
    ("['set', [['int', hex((2**61 - 1) * i)] for i in range(10**5)]]", "timed out"),
    ("['dict', [[['int', hex((2**61 - 1) * i)], 0] for i in range(10**5)]]", "timed out"),
    ("['builtins.range', [0, 10**8, 1]]", "out of memory"),  # a list of it would be
])  # fmt: skip
def test_a_raw_reply_neither_hangs_nor_fills_the_judge(pool, no_worker_ends, reply, status):
    wall = 0.7 if status == "timed out" else 3.0
    assert run(pool, RAW.replace("{}", reply), "assert list(f(2)) == 4", wall=wall).status == status


def test_tests_that_do_not_end_cost_one_response(pool):
    """What is slow in one step of the judge, here a set of colliding numbers, ends it: in one program's time."""
    source = "def f(x): return [(2**61 - 1) * i for i in range(3 * 10**4)]"
    results = pool.run([Program(source, "assert len(set(f(2))) == 1", ("f",), wall=2), *[RIGHT] * 10])
    assert (results[0].status, results[0].detail) == ("timed out", "the tests did not end in time")
    assert all(result.passed for result in results[1:])


def test_late_answers_one_after_the_other_do_not_add_up(pool, no_worker_ends):
    source = "import time\ndef f(x): time.sleep(1.6 if x == 1 else 60)"
    assert run(pool, source, "f(1)\nf(2)", wall=2.0).status == "timed out"


def test_threads_of_one_program_end_no_worker(pool, no_worker_ends):
    """An ordinary user's threads count together, whatever process they are of."""
    source = """
import threading, time
def f(x):
    stop = threading.Event()
    threading.stack_size(1 << 16)
    try:
        for _ in range(2000): threading.Thread(target=stop.wait, daemon=True).start()
    except RuntimeError: pass
    time.sleep(0.5)
"""
    results = pool.run([Program(source, "f(1)", ("f",)), *[RIGHT] * 50])
    assert all(result.passed for result in results)


# ------------------------------------------------------------------------------------------------------- one verdict


@pytest.mark.parametrize("source, status", [
    ("import os\nos.close(3)\nos._exit(0)", "failed"), ("import os\nos.close(3)\nos.abort()", "killed"),
    ("import os, time\nos.close(3)\ntime.sleep(0.01)\nos._exit(0)", "failed"),
    ("import os, time\nos.close(3)\ntime.sleep(60)", "timed out"),
    ("import os\nos.close(3)\nwhile True: pass", "timed out"),
])  # fmt: skip
def test_a_program_that_hangs_up_has_one_status(pool, no_worker_ends, source, status):
    wall, count = (0.7 if "sleep(60)" in source else 3.0), 1 if status == "timed out" else 10
    programs = [Program(source, "assert f(2) == 4", ("f",), wall=wall)] * count
    assert {result.status for result in pool.run(programs)} == {status}


@pytest.mark.parametrize("source, status", [
    ("import os\nprint(3, flush=True)\nos.close(1)\nos.close(3)\nos._exit(0)", "passed"),
    ("import os, time\nprint(3, flush=True)\nos.close(3)\nos.close(1)\ntime.sleep(0.01)\nos._exit(1)", "failed"),
    (RAW + "print(3, flush=True)\nf(1)".replace("{}", "None"), "failed"),
])  # fmt: skip
def test_a_program_that_prints_and_hangs_up_has_one_status(pool, no_worker_ends, source, status):
    results = pool.run([Program(source.replace("{}", "None"), cases=(("", "3"),))] * 10)
    assert {result.status for result in results} == {status}


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


def test_a_pool_that_cannot_replace_a_worker_says_why(monkeypatch, tmp_path):
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
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


def stop_the_next_program(worker) -> None:
    """It waits, forked ahead: of the fork server's two children the second. As if others left it no time."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        tree = [worker.process.pid, *descendants(worker.process.pid)]
        families = [descendants(pid) for pid in tree]
        pairs = [family for family in families if len(family) == 2 and not any(map(descendants, family))]
        if pairs:
            return os.kill(pairs[0][1], signal.SIGSTOP)
    pytest.fail("no program waits")


def test_a_program_that_starved_runs_again_alone(pool, no_worker_ends):
    for worker in pool._workers:
        stop_the_next_program(worker)
    right = Program("def f(x): return x", "assert f(1) == 1", ("f",), wall=0.7)
    assert [result.status for result in pool.run([right] * 2)] == ["passed"] * 2
    for worker in pool._workers:
        stop_the_next_program(worker)
    cases = Program("print(3)", cases=(("", "3"),) * 2, wall=0.7)
    assert [result.status for result in pool.run([cases] * 2)] == ["passed"] * 2


def test_what_runs_again(pool, monkeypatch):
    """What timed out with less than half its wall time of CPU time, if others ran: for a sixteenth, a quarter, all."""
    late, passed, runs = Result("timed out", wall=2, cpu=0.9), Result("passed"), []
    first = [late, Result("timed out", wall=2, cpu=1.1), passed, late, Result("failed"), Result("timed out")]

    def results(programs):
        runs.append([(int(program.source), program.wall) for program in programs])
        if len(runs[-1]) > 1 or len(runs) == 1:
            time.sleep(0.5)
            return first[: len(programs)]
        return [passed if runs[-1] in ([(3, 1.0)], [(5, 1 / 16)]) else late]

    monkeypatch.setattr(pool, "_results", results)
    programs = [Program(str(i), wall=1.0) for i in range(6)]
    assert pool.run(programs) == [late, first[1], passed, passed, first[4], passed]
    again = [(0, 1 / 16), (3, 1 / 16), (5, 1 / 16), (0, 1 / 4), (3, 1 / 4), (0, 1.0), (3, 1.0)]
    assert runs[1:] == [[pair] for pair in again]
    runs.clear()
    assert pool.run(programs[:1]) == [late] and len(runs) == 1


def test_programs_that_sleep_cost_twice_their_time_at_most(monkeypatch):
    with Sandbox(LEVEL, workers=4, limits=LIMITS) as pool:
        runs = []
        once = pool._results
        monkeypatch.setattr(pool, "_results", lambda programs: runs.append(programs) or once(programs))
        results = pool.run([Program("import time\ntime.sleep(60)", "f(1)", ("f",), wall=0.5)] * 12)
        assert {result.status for result in results} == {"timed out"} and len(results) == 12
        assert max(result.wall for result in results) < LIMITS.wall  # a program's own wall time is shorter
        assert len(runs[0]) == 12 and sum(again.wall for (again,) in runs[1:]) < 3.5  # of 12 * 0.5 * 21 / 16


def test_threads_that_the_trainer_starts_later_take_none_from_programs(pool):
    """As an ordinary user, at a level without user namespaces, the system counts them all together."""
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(70)]
    source = "import threading as m\ndef f(x):\n    t = m.Thread(target=print)\n    t.start(), t.join()\n    return x"
    try:
        for thread in threads:
            thread.start()
        results = pool.run([Program(source, "assert f(1) == 1", ("f",))] * 4)
    finally:
        stop.set()
    assert [result.status for result in results] == ["passed"] * 4


def test_workers_are_what_the_system_kills_where_memory_runs_out(alone):
    assert alone.run([RIGHT])[0].passed
    tree = [alone._workers[0].process.pid, *descendants(alone._workers[0].process.pid)]
    scores = []
    for pid in tree:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj") as file:
            scores.append(int(file.read()))
    assert len(scores) >= 2 and set(scores) == {1000}


@pytest.mark.parametrize("tests", [
    f"assert abs(f(2) - {SECRET!r}) < 1e-6", f"assert f(2) + {SECRET!r} == 'x'", f"assert f(2) <= {SECRET!r}",
    f"assert {SECRET!r} - f(2) == 0", f"with f(2) as x:\n    assert x == {SECRET!r}",
    f"assert isinstance({SECRET!r}, f(2))",
])  # fmt: skip
def test_no_operator_tells_the_program_what_is_expected(pool, tests):
    source = """
class E:
    def __eq__(s, *o): return True
    __lt__ = __le__ = __gt__ = __ge__ = __exit__ = __instancecheck__ = __eq__
    def __sub__(s, o): return 0
    def __enter__(s): return s
    __add__ = __radd__ = __rsub__ = __abs__ = __sub__
def f(x): return E()
"""
    assert run(pool, source, tests).status == "failed"
