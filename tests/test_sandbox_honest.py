"""Right programs of kinds that models write pass, and each of them fails when one thing is wrong in it."""

import re

import pytest
from test_sandbox import LEVEL, LIMITS, linux, run

from verifiers.sandbox.pool import Sandbox

pytestmark = [linux]


@pytest.fixture(scope="module")
def pool():
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        yield pool


@pytest.mark.parametrize("source", [
    "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--n', type=int, default=3)\n"
    "print(parser.parse_args().n)", "import sys\nassert len(sys.argv) == 1\nprint(3)",
    "out = open(1, 'w')\nout.write('3')", "import os\nout = os.fdopen(1, 'w')\ndef main():\n    out.write('3')\nmain()",
    "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(3)",
    "class Last:\n    def __del__(self): print(3)\nlast = Last()",
    "class Ring:\n    def __del__(self): print(3)\nring = Ring()\nring.ring = ring",
    "import sys\nprint(3)\nsys.stdout.close()",
    "import os, sys\nsys.stderr = open(os.devnull, 'w')\nprint('no', file=sys.stderr)\nprint(3)",
    "import contextlib, os\nwith open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): print(4)\nprint(3)",
    "import sys\nprint('a remark', file=sys.stderr)\nprint(3)",
    "from __future__ import annotations\ndef f(x: Undefined): return 3\nprint(f(1))",
    "open('/dev/stdout', 'w').write('3')",
    "import os\nnull = os.open(os.devnull, os.O_WRONLY)\nos.write(null, b'4')\nprint(3)",
])  # fmt: skip
def test_ways_to_print(pool, source):
    assert run(pool, source, "", cases=(("", "3"),)).passed
    assert run(pool, source.replace("3", "5"), "", cases=(("", "3"),)).status == "failed"


@pytest.mark.parametrize("source", [
    "import sys\nx = sys.stdin.read()\nsys.stdin.seek(0)\nprint(int(input()) + int(x))",
    "print(2 * int(open('/dev/stdin').readline()))", "import io\nprint(2 * int(io.open('/dev/stdin').readline()))",
    "x = int(input())\nprint(x + int(open('/dev/stdin').read()))",
    "import os\nprint(2 * int(os.read(os.open('/dev/stdin', os.O_RDONLY), 9)))",
    "import sys\nsys.stdin = open(0)\nprint(2 * int(input()))",
])  # fmt: skip
def test_ways_to_read(pool, source):
    assert run(pool, source, "", cases=(("3\n", "6"),)).passed
    assert run(pool, source, "", cases=(("4\n", "6"),)).status == "failed"


@pytest.mark.parametrize("source", [
    "from multiprocessing.dummy import Pool\ndef f(x):\n    with Pool(3) as pool: return pool.map(abs, [-3, x])",
    "import multiprocessing\nlock = multiprocessing.Lock()\ndef f(x):\n    with lock: return [3, x]",
    "import multiprocessing as m\ncontext = m.get_context('fork')\nqueue, lock = m.Queue(), context.RLock()\n"
    "def f(x):\n    queue.put(3)\n    with lock: return [queue.get(), x]",
])  # fmt: skip
def test_threads_that_look_like_processes(pool, source):
    assert run(pool, source, "assert f(2) == [3, 2]").passed
    assert run(pool, source.replace("3", "6"), "assert f(2) == [3, 2]").status == "failed"


@pytest.mark.slow
def test_large_libraries_can_be_used():
    with Sandbox(LEVEL, workers=1) as pool:
        source = "from sympy import Integer, Float\ndef f(x): return [Integer(x) + 3, Float(0.5)]"
        assert run(pool, source, "assert f(2) == [5, 0.5]").passed
        source = "import torch\ndef f(x): return torch.tensor([3, x]).tolist()"
        assert run(pool, source, "assert f(2) == [3, 2]").passed


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


DATACLASS = """
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    y: object = None
def f(x): return [Point(3, Point(x))]
"""


@pytest.mark.parametrize("source, tests", [
    ("def f(x): return {'a': 1, '3': x}.keys()", "assert f(2) == {'a', '3'} and list(f(2)) == ['a', '3']"),
    ("def f(x): return {'a': 3}.items()", "assert f(2) == {('a', 3)}"),
    ("def f(x): return range(3, x)", "assert f(9) == range(3, 9) and list(f(5)) == [3, 4] and 3 in f(4)"),
    ("import datetime\ndef f(x): return datetime.date(2020, 1, 3)", "import datetime\nd = f(2)\n"
     "assert d == datetime.date(2020, 1, 3) and d.day == 3 and d - d == datetime.timedelta(0)"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(3, y=x)",
     "p = f(2)\nassert p == (3, 2) and p.x == 3 and p.y == 2 and p._replace(y=5) == P(3, 5)"),
    ("class P:\n    def __init__(s, a, b): s.a, s.b = a, b\n    def swap(s): return P(s.b, s.a)\n"
     "def f(pairs): return [p.a + 3 for p in pairs]", "p = P(1, 2)\np.a = 7\nassert f([p, P(3, 4)]) == [10, 6]\n"
     "assert p.swap().a == 2 and p == p and p != P(7, 2)"),
    (DATACLASS, "assert f(2) == [Point(3, Point(2))] and f(2)[0] != Point(2)"),
    ("class MyError(ValueError): pass\ndef f(x):\n    if x == 3: raise MyError",
     "try:\n    f(3)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("import json\ndef f(x): return json.loads(x) + 3",
     "try:\n    f('{')\nexcept ValueError:\n    assert f('1') == 4\nelse:\n    assert False"),
    ("def f(x): return b'\\xff'.decode() if x == 3 else x",
     "try:\n    f(3)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("f = lambda x: x + 3", "assert f(1) == 4"),
    (VECTOR, "v = V(1, 2) + V(3, 4)\nassert v.x == [4, 6] and abs(-v) == -10 and not v < V(4, 5) and v > V(4, 5)\n"
     "with v as w:\n    assert w.x == [4, 6]\nassert v.x == [4, 6, 3]"),
    (VECTOR, "assert isinstance(W(3), V) and not isinstance(V(3), W) and isinstance(W(), (int, V)) and V(3).x == [3]\n"
     "assert not isinstance(3, V)\ntry:\n    V(1) - V(2)\n    assert False\nexcept TypeError:\n    pass\n"
     "v = V()\ntry:\n    with v: raise ValueError\nexcept ValueError:\n    assert v.x == [3]\nelse:\n    assert False"),
    ("import numbers\nclass I:\n    def __int__(s): return 5\nclass R:\n    def __float__(s): return 0.3\n"
     "numbers.Integral.register(I)\nnumbers.Real.register(R)\ndef f(x): return [I(), R()]",
     "assert f(2) == [5, 0.3] and [type(x).__name__ for x in f(2)] == ['int', 'float']"),
])  # fmt: skip
def test_kinds_of_results(pool, source, tests):
    names = [name for name in ("f", "P", "Point", "V", "W") if re.search(rf"(def|class) {name}\b|\b{name} =", source)]
    assert run(pool, source, tests, tuple(names)).passed
    assert run(pool, source.replace("3", "6"), tests, tuple(names)).status == "failed"
