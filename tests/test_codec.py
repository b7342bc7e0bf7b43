"""What a program answers is read by `decode` in the judge: every value survives, no bytes hang or fill the judge."""

import datetime
import json
import random
import resource
import subprocess
import sys
from collections import OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from verifiers.sandbox import codec
from verifiers.sandbox.codec import DIGITS, as_json, decode, encode, from_json, receive

Point = namedtuple("Point", "x y")
COLLIDING = 2**61 - 1  # all its multiples have the hash 0
VALUES = [
    *(None, True, 3, -(10**30), 1.5, float("inf"), "text \ud800", b"bytes", 2j, range(3, 9, 2)),
    *([1, (2, [3.0])], {"a": {1: ()}}, {1, 2}, frozenset({"x"}), deque([1]), Point(1, (2, "b"))),
    *(Decimal("1.50"), Fraction(-1, 3), datetime.date(2020, 2, 29), datetime.time(23, 5, 1, 7)),
    *(datetime.datetime(2020, 2, 29, 1, 2, 3), datetime.timedelta(-1, 5, 9)),
]


def there_and_back(value):
    return decode(from_json(as_json(encode(value, lambda value: ["reference", 7]))), lambda number: f"object {number}")


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_with_their_types(value):
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value) or (type(back).__name__, type(back)._fields) == ("Point", Point._fields)


def test_views_of_a_dict_compare_like_its_own():
    for mapping in ({"a": 1, "b": [2]}, OrderedDict(a=1, b=[2])):
        assert there_and_back(mapping.keys()) == {"a", "b"} and list(there_and_back(mapping.keys())) == ["a", "b"]
        assert there_and_back(mapping.keys()) != ["a", "b"] and ("a", 1) in there_and_back(mapping.items())


def test_subclasses_come_back_as_what_they_are_built_on():
    class Text(str):
        def __eq__(self, other):
            return True

    assert there_and_back([Text("a"), OrderedDict(a=1)]) == ["a", {"a": 1}]
    assert [type(item) for item in there_and_back([Text("a"), OrderedDict(a=1)])] == [str, dict]
    aware = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    assert there_and_back([object(), lambda: 0, aware]) == ["object 7"] * 3


@pytest.mark.parametrize("data", [
    ["fractions.Fraction", ["1e999999999", 1]], ["fractions.Fraction", [["list", []], 1]],
    ["fractions.Fraction", [1, 0]], ["decimal.Decimal", "1e999999999"], ["decimal.Decimal", [0, [1], 999999999]],
    ["decimal.Decimal", "9" * (DIGITS + 1)], ["int", "f" * (DIGITS + 1)], ["int", [7]],
    ["builtins.complex", [10**400, 1]],
    ["builtins.eval", ["1"]], ["builtins.bytes", [1 << 40]], ["datetime.date", [10**30, 1, 1]], ["list", "abc"],
    ["namedtuple", ["P", ["x" * 2000], [1]]], ["namedtuple", ["P", ["a"] * 999, [1]]],
    ["namedtuple", ["P", ["__class__"], [1]]], ["namedtuple", ["P", ["x=exit()"], [1]]], ["set", [["list", []]]],
    ["dict", [[1]]], ["dict", {"a": 1, "b": [3]}], {"kind": "list"}, ["unknown", []], [], [[], []], ["list"],
], ids=lambda data: repr(data)[:60])  # fmt: skip
def test_what_encodes_no_value_is_refused(data):
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        decode(from_json(json.dumps(data).encode()), None)


@pytest.mark.parametrize("kind", ["set", "frozenset", "keys", "dict"])
def test_colliding_keys_are_bounded_by_the_deadline(monkeypatch, kind):
    keys = [["int", hex(COLLIDING * i)] for i in range(1, 2000)]
    clock = iter(range(10**6))
    monkeypatch.setattr(codec.time, "monotonic", lambda: next(clock))
    with pytest.raises(TimeoutError):
        decode([kind, [[key, 0] for key in keys] if kind == "dict" else keys], None, deadline=500)
    assert next(clock) < 600  # looked at between the items: none is added after it


def test_an_answer_that_drips_in_does_not_start_the_clock_again(monkeypatch):
    class Dripping:
        """A channel on which each byte takes 4 seconds."""

        now, timeouts = 100.0, []

        def settimeout(self, seconds):
            self.timeouts.append(seconds)

        def recv(self, size):
            self.now += 4
            return b"\0"

    channel = Dripping()
    monkeypatch.setattr(codec.time, "monotonic", lambda: channel.now)
    with pytest.raises(TimeoutError):
        receive(channel, deadline=110.0)
    assert channel.timeouts == [10, 6, 2]


LEAVES = [0, -1, 9**99, COLLIDING, 1e308, None, "", "1e999999999", "-0x1", "a" * 300, [], ["int", "7" * 400], 1 << 40]
KINDS = [*codec.COLLECTIONS, *codec.NUMBERS]
KINDS += ["int", "bytes", "decimal.Decimal", "keys", "items", "dict", "namedtuple", "reference", "no kind"]


def mutated(data, rng: random.Random):
    """A valid reply with one piece replaced, doubled or wrapped."""
    if isinstance(data, list) and data and rng.random() < 0.8:
        at = rng.randrange(len(data))
        return [*data[:at], mutated(data[at], rng), *data[at + rng.choice([0, 1, 1, 1]) :]]
    wrapped = [rng.choice(KINDS), rng.choice([data, [data] * rng.choice([1, 2, 3, 1000])])]
    return rng.choice([*LEAVES, *KINDS, wrapped, wrapped, encode(rng.choice(VALUES), None)])


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A valid reply with some of its bytes cut, doubled, replaced."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in "ab")
    new = [b"", data[a:b] * 2, b"[" * rng.choice([1, 5000]), bytes([rng.randrange(256)]), b"9" * 5000, b'{"a":1}']
    return data[:a] + rng.choice(new) + data[b:]


def fuzz(count: int) -> None:
    """Read `count` mutated replies in little memory and CPU time. Raises what no judge expects; killed if it hangs."""
    resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
    rng, read = random.Random(0), 0
    for _ in range(count):
        resource.setrlimit(resource.RLIMIT_CPU, (int(sum(resource.getrusage(0)[:2])) + 5, -1))
        reply = encode(rng.choice(VALUES), None)
        for _ in range(rng.randint(1, 4)):
            reply = mutated(reply, rng)
        reply = as_json(reply)
        try:
            decode(from_json(reply if rng.random() < 0.8 else mutated_bytes(reply, rng)), str)
            read += 1
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            pass
    assert 0.1 * count < read < 0.9 * count  # mutations of both kinds: values, and none


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_replies_neither_hang_nor_fill_the_judge(count):
    here = Path(__file__).parent
    code = f"""
import sys
sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]
import test_codec
test_codec.fuzz({count})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
