"""Right programs of kinds that models write pass, and each of them fails when one thing is wrong in it."""

import pytest
from test_sandbox import LEVEL, LIMITS, linux, run

from verifiers.sandbox import Sandbox

pytestmark = [linux]


@pytest.fixture(scope="module")
def pool():
    with Sandbox(LEVEL, workers=2, limits=LIMITS) as pool:
        yield pool


@pytest.mark.parametrize("source", [
    "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--n', type=int, default=3)\n"
    "print(parser.parse_args().n)",
    "import sys\nassert len(sys.argv) == 1\nprint(3)",
    "out = open(1, 'w')\nout.write('3')",
    "import os\nout = os.fdopen(1, 'w')\ndef main():\n    out.write('3')\nmain()",
    "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(3)",
    "class Last:\n    def __del__(self): print(3)\nlast = Last()",
    "class Ring:\n    def __del__(self): print(3)\nring = Ring()\nring.ring = ring",
    "import sys\nprint(3)\nsys.stdout.close()",
    "import os, sys\nsys.stderr = open(os.devnull, 'w')\nprint('no', file=sys.stderr)\nprint(3)",
    "import contextlib, os\nwith open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): print(4)\nprint(3)",
    "import sys\nprint('a remark', file=sys.stderr)\nprint(3)",
    "from __future__ import annotations\ndef f(x: Undefined): return 3\nprint(f(1))",
])  # fmt: skip
def test_ways_to_print(pool, source):
    assert run(pool, source, "", cases=(("", "3"),)).passed
    assert run(pool, source.replace("3", "5"), "", cases=(("", "3"),)).status == "failed"


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
    (DATACLASS, "assert f(2) == [Point(3, Point(2))] and f(2)[0] != Point(2)"),
    ("class MyError(ValueError): pass\ndef f(x):\n    if x == 3: raise MyError",
     "try:\n    f(3)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("import json\ndef f(x): return json.loads(x) + 3",
     "try:\n    f('{')\nexcept ValueError:\n    assert f('1') == 4\nelse:\n    assert False"),
    ("def f(x): return b'\\xff'.decode() if x == 3 else x",
     "try:\n    f(3)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("f = lambda x: x + 3", "assert f(1) == 4"),
])  # fmt: skip
def test_kinds_of_results(pool, source, tests):
    names = [name for name in ("f", "P", "Point") if name in source]
    assert run(pool, source, tests, tuple(names)).passed
    assert run(pool, source.replace("3", "6"), tests, tuple(names)).status == "failed"
