"""The sandbox: right programs of kinds that models write pass, and each fails when one thing is wrong in it; the pool
survives its own accidents. Attacks: test_sandbox_attacks.py. SANDBOX=<level> runs both at another than the strongest.
"""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from verifiers import BadInput
from verifiers.sandbox import lock
from verifiers.sandbox.pool import FOLDER, Limits, Program, Result, Sandbox

LEVEL = os.environ.get("SANDBOX", "auto")
LIMITS = Limits(wall=3, cpu=1, memory=512 << 20, output=1 << 16)
SECRET = "c0ffee5eed"  # stands in the tests only: no program can guess it

ISOLATED = LEVEL != "rlimits"  # which keeps no program from the machine
REFUSED = "refused" if ISOLATED else "failed"
isolated = pytest.mark.skipif(not ISOLATED, reason="the level `rlimits` keeps no program from the machine")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the levels that isolate need Linux")
pytestmark = [linux]


@pytest.fixture(scope="module")
def pool():
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        yield pool


RIGHT = Program("def f(x): return x", "assert f(1) == 1", ("f",))


def run(pool: Sandbox, source: str, tests: str = f"assert f(2) == {SECRET!r}", names=("f",), **fields) -> Result:
    return pool.run([Program(source, tests, names, **fields)])[0]


# ------------------------------------------------------------------------------------------------ honest programs
def test_a_right_program_passes_and_its_value_comes_back(pool):
    source = "def f(x):\n    return [x, (x, {'a': 10**30})]"
    result = run(pool, source, "value = f(2)\nassert value[1] == (2, {'a': 10**30})")
    assert result.passed and result.value == [2, [2, {"a": 10**30}]]  # as JSON holds it
    assert run(pool, "def f(x): return x", "assert f(2) == 3").status == "failed"
    for huge in ("{1, 2}", "10**5000", "'x' * (17 << 20)"):
        assert run(pool, f"def f(x): return {huge}", "value = f(2)").status in ("failed", "output truncated")


def test_neither_the_pool_nor_a_worker_needs_torch(pool):
    code = "import sys, verifiers.rows, verifiers.sandbox.pool, verifiers.workers\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent).returncode == 0
    source = "import sys\ndef f(): return [*sys.modules], sys.path"
    tests = f"modules, path = f()\nassert 'sandbox.worker' in modules and {str(FOLDER)!r} not in path"
    assert run(pool, source, tests + "\nassert not {'verifiers', 'torch', 'dataclasses'} & {*modules}").passed


@pytest.mark.parametrize("source, status", [
    ("print(3)\nraise SystemExit(1)", "failed"), ("while True: print(3)", "output truncated"),
    ("import time\nprint(3, flush=True)\ntime.sleep(60)", "timed out"), ("x = [0] * 10**9", "out of memory"),
    ("import socket\nsocket.socket()", REFUSED),
])  # fmt: skip
def test_verdicts_of_programs_that_print(pool, source, status):
    wall = 0.7 if "sleep" in source else math.inf
    assert run(pool, source, "", cases=(("", "3\n"),), wall=wall).status == status


PRINTS = [  # 3, and end
    "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--n', type=int, default=3)\n"
    "print(parser.parse_args().n)",
    "import os\nout = os.fdopen(1, 'w')\ndef main():\n    out.write('3')\nmain()",
    "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(3)",
    "class Last:\n    def __del__(self): print(3)\nlast = Last()",
    "class Ring:\n    def __del__(self): print(3)\nring = Ring()\nring.ring = ring",
    "import sys\nprint(3)\nsys.stdout.close()",
    "import contextlib, os\nwith open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): print(4)\nprint(3)",
    "open('/dev/stdout', 'w').write('3')",
    "import os\nnull = os.open(os.devnull, os.O_WRONLY)\nos.write(null, b'4')\nprint(3)",
]  # fmt: skip


@pytest.mark.parametrize("source", [
    "import sys\nx = sys.stdin.read()\nsys.stdin.seek(0)\nprint(int(input()) + int(x))",
    "import io\nprint(2 * int(io.open('/dev/stdin').readline()))",
    "import sys\nsys.stdin = open(0)\nprint(2 * int(input()))",
    "import os\nprint(2 * int(os.read(os.open('/dev/stdin', os.O_RDONLY), 9)))",
    "x = int(input())\nprint(x + int(open('/dev/stdin').read()))",
    "import os\nprint(2 * int(os.read(0, os.fstat(0).st_size)))",
    "import sys, threading\ndef main(): print(2 * int(sys.stdin.read()))\n"
    "threading.stack_size(2**26)\nthreading.Thread(target=main).start()",
    "import sys, atexit, io\nout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n"
    "out.write(str(2 * int(sys.stdin.read())))",
    "from pathlib import Path\nprint(2 * int(Path('/dev/stdin').read_text()), end=__file__.removeprefix('program.py'))",
    "import concurrent.futures as f\npool = f.ThreadPoolExecutor(2)\nprint(2 * pool.submit(int, input()).result())",
    # an output of the program's own
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint(2 * int(input()))",
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint(2 * int(input()))",
    "import os, sys\nclass Out:\n    text = ''\n    def write(self, text): self.text += text\n"
    "    def flush(self): os.write(1, self.text.encode())\nsys.stdout = Out()\nprint(2 * int(input()))",
    "import sys\nprint(2 * int(input()))\nsys.stdout.flush()\nsys.stdout = None",
])  # fmt: skip
def test_ways_to_read(pool, source):
    assert run(pool, source, "", cases=(("3\n", "6"), ("4\n", "8"))).passed
    assert run(pool, source, "", cases=(("3\n", "6"), ("4\n", "6"))).status == "failed"


@pytest.mark.slow
def test_large_libraries_can_be_used():
    of_sympy = "from sympy import Integer, Float\ndef f(x): return [Integer(x) + 3, Float(0.5)]"
    of_torch = "import torch\ndef f(x): return torch.tensor([3, x]).tolist()"
    with Sandbox(LEVEL, workers=1) as pool:
        assert run(pool, of_sympy, "assert f(2) == [5, 0.5]").passed
        assert run(pool, of_torch, "assert f(2) == [3, 2]").passed


VECTOR = """
class V:
    def __init__(self, *x): self.x = list(x)
    def __add__(self, other): return V(*(a + b for a, b in zip(self.x, other.x)))
    def __lt__(self, other): return self.x < other.x
    def __neg__(self): return V(*(-a for a in self.x))
    def __abs__(self): return sum(self.x)
    def __enter__(self): return self
    def __exit__(self, *error): self.x.append(3)
class W(V): pass
"""
KINDS = [  # of results, and tests of them
    *((source, "assert f(2) == [3, 2]") for source in (  # threads that look like processes
        "from multiprocessing.dummy import Pool\ndef f(x):\n    with Pool(3) as pool: return pool.map(abs, [-3, x])",
        "import multiprocessing\nlock = multiprocessing.Lock()\ndef f(x):\n    with lock: return [3, x]",
        "import multiprocessing as m\ncontext = m.get_context('fork')\nqueue, lock = m.Queue(), context.RLock()\n"
        "def f(x):\n    queue.put(3)\n    with lock: return [queue.get(), x]",
    )),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(3, y=x)",
     "p = f(2)\nassert p == (3, 2) and p.x == 3 and p.y == 2 and p._replace(y=5) == P(3, 5)"),
    ("class P:\n    def __init__(s, a, b): s.a, s.b = a, b\n    def swap(s): return P(s.b, s.a)\n"
     "def f(pairs): return [p.a + 3 for p in pairs]", "p = P(1, 2)\np.a = 7\nassert f([p, P(3, 4)]) == [10, 6]\n"
     "assert p.swap().a == 2 and p == p and p != P(7, 2)"),
    ("from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n    y: object = None\n"
     "def f(x): return [Point(3, Point(x))]", "assert f(2) == [Point(3, Point(2))] and f(2)[0] != Point(2)"),
    ("import json\ndef f(x): return json.loads(x) + 3",
     "try:\n    f('{')\nexcept ValueError:\n    assert f('1') == 4\nelse:\n    assert False"),
    ("def f(x): return b'\\xff'.decode() if x == 3 else x",
     "try:\n    f(3)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("f = lambda x: x + 3", "assert f(1) == 4"),
    ("def f(x): return (i * i for i in range(3))", "it = iter(f(2))\nassert next(it) == 0 and next(it) == 1\n"
     "import math\nassert list(f(2)) == [0, 1, 4] and math.isclose(sum(f(2)), 5.0) and 4 in f(2) and 5 not in f(2)"),
    (VECTOR, "v = V(1, 2) + V(3, 4)\nassert v.x == [4, 6] and abs(-v) == -10 and not v < V(4, 5) and v > V(4, 5)\n"
     "with v as w:\n    assert w.x == [4, 6]\nassert v.x == [4, 6, 3]"),
    (VECTOR, "assert isinstance(W(3), V) and not isinstance(V(3), W) and isinstance(W(), (int, V)) and V(3).x == [3]\n"
     "assert not isinstance(3, V)\ntry:\n    V(1) - V(2)\n    assert False\nexcept TypeError:\n    pass\n"
     "v = V()\ntry:\n    with v: raise ValueError\nexcept ValueError:\n    assert v.x == [3]\nelse:\n    assert False"),
    ("import numbers\nclass I:\n    def __int__(s): return 5\nclass R:\n    def __float__(s): return 0.3\n"
     "numbers.Integral.register(I)\nnumbers.Real.register(R)\ndef f(x): return [I(), R()]",
     "assert f(2) == [5, 0.3] and [type(x).__name__ for x in f(2)] == ['int', 'float']"),
]  # fmt: skip


@pytest.mark.parametrize("source, tests", [*((source, "") for source in PRINTS), *KINDS])
def test_right_programs_pass_and_fail_with_another_number(pool, source, tests):
    names = [name for name in ("f", "P", "Point", "V", "W") if re.search(rf"(def|class) {name}\b|\b{name} =", source)]
    cases = () if tests else (("", "3"),)
    assert run(pool, source, tests, tuple(names), cases=cases).passed
    assert run(pool, source.replace("3", "6"), tests, tuple(names), cases=cases).status == "failed"


# ----------------------------------------------------------------------------------------------------------- the pool
OF_9 = "assert f(3) == 9"
DRAWS = "import random\ny = random.random()", "import numpy\ny = float(numpy.random.random())"
MIXED = {Program(source, tests, ("f",)): status for source, tests, status in [
    ("def f(x): return x * x", OF_9, "passed"), ("def f(x): return x", OF_9, "failed"),
    *((f"{draw}\ndef f(x): return y", "value = f(3)", "passed") for draw in DRAWS),
    *((f"def f(x): return {x}", f"{draw}\nvalue = f(y)", "passed") for draw in DRAWS for x in ("x", "+x")),
    ("def f(x): return {str(i) for i in range(x)}", "value = list(f(9))", "passed"),
    ("import socket\ndef f(x): return socket.socket()", OF_9, REFUSED),
    ("def f(x): return [0] * 10**9", OF_9, "out of memory"), ("def f(x):\n    while True: pass", OF_9, "timed out"),
]}  # fmt: skip


def test_a_verdict_depends_on_its_program_alone():
    """Whatever the number of workers and the order of programs, and a second time. The numbers that its tests draw are
    neither the program's nor those of other tests."""
    expected, found = MIXED | {Program("print(input())", cases=(("7", "7"), ("8", "8"))): "passed"}, {}
    for count in (1, 3):
        with Sandbox(LEVEL, workers=count, limits=LIMITS) as pool:
            for programs in ([*expected], [*reversed(expected)]):
                for program, result in zip(programs, pool.run(programs)):
                    assert result.status == expected[program]
                    assert found.setdefault(program, result.value) == result.value
    assert len({found[program] for program in expected if "random" in program.source + program.tests}) == 6


def descendants(pid: int) -> list[int]:
    """All processes that descend from this one, parents before children."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            parents[int(name)] = int(file.read().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for parent in found:
        found += sorted(child for child in parents if parents[child] == parent)
    return found[1:]


def gone(pids: list) -> bool:
    """Whether these processes end, soon."""
    deadline = time.monotonic() + 30
    while (alive := any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


def test_nothing_is_left_behind():
    before = len(descendants(os.getpid()))
    temporary = set(os.listdir("/tmp"))
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        assert len(descendants(os.getpid())) >= before + 4  # two fork servers and two judges
        busy = "import threading\nthreading.Thread(target=lambda: list(iter(int, 1))).start()\ndef f(x): return 1"
        pool.run([Program(busy, "assert f(1) == 1", ("f",))] * 4)
        most = 3 if pool.level == "landlock" else 5  # fork server, judge, the program that waits; bwrap twice
        assert len(descendants(os.getpid())) <= before + 2 * most
    assert len(descendants(os.getpid())) == before
    assert not [name for name in set(os.listdir("/tmp")) - temporary if "sandbox" in name or "stdin" in name]


@pytest.mark.parametrize("count", [0, 4])
def test_a_dead_worker_is_replaced_and_its_program_run_again(count):
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        orphans = []  # judges, and programs that wait for one
        for worker in pool._workers:
            orphans += descendants(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        assert [result.status for result in pool.run([RIGHT] * count)] == ["passed"] * count
    assert orphans and gone(orphans)


def all_end_with(code: str) -> bool:
    """Whether both processes whose numbers this program prints end, soon, when it is killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER.parent, stdin=pipe, stdout=pipe) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.3)
        parent.kill()
    return len(pids) == 2 and gone(pids)


def test_a_worker_ends_with_its_pool():
    """A trainer that is killed cannot say goodbye: the workers notice by themselves."""
    numbers = f"*(worker.process.pid for worker in Sandbox({LEVEL!r}, 2)._workers)"
    assert all_end_with(f"from verifiers.sandbox.pool import Sandbox\nprint({numbers}, flush=True)\ninput()")


def test_no_level_weaker_than_asked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="bwrap is not installed.*--sandbox landlock or rlimits"):
        Sandbox("bubblewrap")
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    lock.filters.cache_clear()
    for level in ("auto", "landlock"):
        with pytest.raises(BadInput, match="landlock: .*pyseccomp.*--sandbox rlimits"):
            Sandbox(level)
    with pytest.raises(BadInput, match="unknown sandbox 'docker'"):
        Sandbox("docker")
    monkeypatch.undo()
    monkeypatch.setattr(lock, "readable", lambda: ["/"])
    with pytest.raises(BadInput, match="the lock does not hold"):
        Sandbox("landlock", workers=1)


def test_a_worker_starts_whatever_numbers_its_descriptors_have(pool):
    """A trainer with 60 open files, or with many workers, hands over the numbers that a worker uses for its own."""
    with contextlib.ExitStack() as held:
        while (number := held.enter_context(open(os.devnull)).fileno()) < 64:
            if number > 56:
                with Sandbox(pool.level, workers=1) as other:
                    assert other.run([RIGHT])[0].passed
