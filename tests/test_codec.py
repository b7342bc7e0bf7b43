"""What a program answers is read by `decode` in the judge: every value survives, no bytes hang or fill the judge."""

import datetime
import json
import tracemalloc
from collections import OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verifiers.sandbox import codec
from verifiers.sandbox.codec import DIGITS, as_json, decode, encode, from_json, receive

Point = namedtuple("Point", "x y")
COLLIDING = 2**61 - 1  # all its multiples have the hash 0
VALUES = [
    *(None, True, 3, -(10**30), 1.5, float("inf"), "text \ud800", b"bytes", 2j, range(3, 9, 2)),
    *([1, (2, [3.0])], {"a": {1: ()}}, {1, 2}, frozenset({"x"}), deque([1]), Point(1, (2, "b"))),
    *(Decimal("1.50"), Fraction(-1, 3), datetime.date(2020, 2, 29), datetime.time(23, 5, 1, 7)),
    *(datetime.datetime(2020, 2, 29, 1, 2, 3), datetime.timedelta(-1, 5, 9), {"b": 1}.keys(), {"a": [2]}.items()),
]


def there_and_back(value):
    return decode(from_json(as_json(encode(value, lambda value: ["reference", 7]))), lambda number: f"object {number}")


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_with_their_types(value):
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value) or (type(back).__name__, type(back)._fields) == ("Point", Point._fields)


def test_subclasses_come_back_as_what_they_are_built_on():
    class Text(str):
        def __eq__(self, other):
            return True

    ordered = OrderedDict(b=1, a=[2])
    text, mapping, keys, items = there_and_back([Text("a"), ordered, ordered.keys(), ordered.items()])
    assert [type(text), text, type(mapping), mapping] == [str, "a", dict, {"b": 1, "a": [2]}]
    assert keys == mapping.keys() and items == mapping.items() and list(keys) == ["b", "a"]
    aware = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    assert there_and_back([object(), lambda: 0, aware]) == ["object 7"] * 3


@pytest.mark.parametrize("data", [
    ["fractions.Fraction", ["1e999999999", 1]], ["fractions.Fraction", [1, 0]], ["decimal.Decimal", "1e999999999"],
    ["decimal.Decimal", [0, [1], 999999999]], ["decimal.Decimal", "9" * (DIGITS + 1)], ["int", "f" * (DIGITS + 1)],
    ["int", [7]], ["builtins.complex", [10**400, 1]], ["builtins.eval", ["1"]], ["list", "abc"],
    *(["namedtuple", ["P", names, [1]]] for names in (["x" * 2000], ["a"] * 999, ["__class__"], ["x=exit()"])),
    ["set", [["list", []]]], ["dict", [[1]]], ["dict", {"a": 1, "b": [3]}], {"kind": "list"}, ["unknown", []], [],
    [[], []], ["list"], b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"", b"9" * 5000, b"[1,",
], ids=lambda data: repr(data)[:60])  # fmt: skip
def test_what_encodes_no_value_is_refused(data):
    with pytest.raises((ValueError, TypeError, ArithmeticError, RecursionError)):
        decode(from_json(data if isinstance(data, bytes) else json.dumps(data).encode()), None)


@pytest.mark.parametrize("kind", ["set", "frozenset", "keys", "dict"])
def test_colliding_keys_are_bounded_by_the_deadline(monkeypatch, kind):
    keys = [["int", hex(COLLIDING * i)] for i in range(1, 2000)]
    clock = iter(range(10**6))
    monkeypatch.setattr(codec.time, "monotonic", lambda: next(clock))
    with pytest.raises(TimeoutError):
        decode([kind, [[key, 0] for key in keys] if kind == "dict" else keys], None, deadline=500)
    assert next(clock) < 600  # looked at between the items: none is added after it


def test_an_answer_that_drips_in_does_not_start_the_clock_again(monkeypatch):
    """Each byte takes 4 of its 10 seconds."""
    now, timeouts = iter(range(100, 200, 4)), []
    channel = SimpleNamespace(settimeout=timeouts.append, recv=lambda size: b"\0")
    monkeypatch.setattr(codec.time, "monotonic", lambda: next(now))
    with pytest.raises(TimeoutError):
        receive(channel, deadline=110)
    assert timeouts == [10, 6, 2]


KINDS = [*codec.COLLECTIONS, *codec.NUMBERS, "int", "bytes", "decimal.Decimal", "items", "dict", "namedtuple"]
LEAVES = [0, -1, 9**99, COLLIDING, 1e308, None, "", "1e999999999", "-0x1", "a" * 300, "7" * 400, 1 << 40, *KINDS]
REPLIES = st.recursive(  # valid replies, and such as are wrong in one place or all
    st.sampled_from([*LEAVES, *(encode(value, None) for value in VALUES)]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(st.sampled_from([*KINDS, "reference", "no kind"]), inner),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=1000)
@given(REPLIES)
@example([["list", [0] * 10**5]])
def test_any_reply_is_a_value_or_refused_and_needs_little_memory(reply):
    data = as_json(reply)
    tracemalloc.start()
    try:
        decode(from_json(data), str)
    except (ValueError, TypeError, ArithmeticError):
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < (1 << 20) + 100 * len(data)
