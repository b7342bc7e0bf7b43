"""Messages between pool, judge and programs, and values as JSON. `decode` reads what hostile programs wrote.
A message is its length, four bytes, and its bytes. A value is a JSON scalar or [kind, content]; `encode` lists kinds.
"""

import functools
import importlib
import json
import marshal
import math
import numbers
import socket
import time
from collections import deque, namedtuple

DIGITS = 1 << 17  # of the longest number, and the largest exponent of a Decimal: int() of 1e999999999 never ends
NAMES = 1000  # characters in all the field names of a named tuple, for which a class is made
# what the judge may ask of two of a program's own objects
OPERATORS = "lt le gt ge add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
KEYS, ITEMS = type({}.keys()), type({}.items())
COLLECTIONS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque)} | {"keys": KEYS}
# class -> the arguments, all numbers, by which it is made, and the names of its attributes that hold them
NUMBERS = {
    "builtins.complex": "real imag", "builtins.range": "start stop step", "fractions.Fraction": "numerator denominator",
    "datetime.date": "year month day", "datetime.time": "hour minute second microsecond",
    "datetime.datetime": "year month day hour minute second microsecond",
    "datetime.timedelta": "days seconds microseconds",
}  # fmt: skip
_named = functools.lru_cache(256)(namedtuple)
_decoder = json.JSONDecoder(object_pairs_hook=list)


def send(channel: socket.socket, message, dumps=marshal.dumps) -> None:
    """Send one message of plain data."""
    data = dumps(message)
    channel.sendall(len(data).to_bytes(4, "big") + data)


def as_json(message) -> bytes:
    """The bytes of a message for `from_json`, which need not trust them as marshal does."""
    return json.dumps(message).encode()


def from_json(data: bytes):
    """What a program wrote; objects as lists, for keys may be chosen to collide. Raises ValueError, RecursionError."""
    return _decoder.decode(data.decode())


def receive(channel: socket.socket, deadline=math.inf, limit: int = 1 << 31, loads=marshal.loads, rest=None):
    """The next message. Raises EOFError, TimeoutError after `deadline` (of time.monotonic), OverflowError beyond
    `limit` bytes, and what `loads` raises. rest: a bytearray that keeps what came after it, for the next call."""
    rest = bytearray() if rest is None else rest
    while len(rest) < 4 or len(rest) < (size := 4 + int.from_bytes(rest[:4], "big")) <= limit:
        if deadline < math.inf:  # for each part: one that drips in must not start the clock again
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            channel.settimeout(left)
        part = channel.recv(1 << 16)
        if not part:
            raise EOFError("the other end is closed")
        rest.extend(part)
    if size > limit:
        raise OverflowError(f"a message of {size} bytes")
    message = bytes(rest[4:size])
    del rest[:size]
    return loads(message)


def encode(value, reference):
    """A value as JSON. Subclasses become their built-in type, named tuples keep their fields; `reference(value)` stands
    for everything that is no plain data."""
    if value is None or type(value) in (bool, str, float):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < 1 << 63 else ["int", hex(value)]
    if isinstance(value, (str, float)):
        return str.__str__(value) if isinstance(value, str) else float.__float__(value)
    if isinstance(value, tuple) and hasattr(type(value), "_fields"):
        return ["namedtuple", [type(value).__name__, [*value._fields], [encode(item, reference) for item in value]]]
    for kind, of in COLLECTIONS.items():
        if isinstance(value, of):
            return [kind, [encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, reference), encode(v, reference)] for k, v in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, ITEMS):
        return ["items", encode(dict(value), reference)[1]]
    name = f"{type(value).__module__}.{type(value).__name__}"
    if name == "decimal.Decimal":
        return [name, str(value)]
    if name in NUMBERS and getattr(value, "tzinfo", None) is None:
        return [name, [encode(getattr(value, field), reference) for field in NUMBERS[name].split()]]
    if isinstance(value, numbers.Real):  # such as sympy's
        return encode((int if isinstance(value, numbers.Integral) else float)(value), reference)
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), reference)
    return reference(value)


def decode(data, dereference, deadline: float = math.inf):
    """The value that `encode` was given. dereference(number): the object behind a reference. Whatever the data says,
    only built-in types are made here, nothing much larger than the data, and nothing that goes on for long after
    `deadline` (of time.monotonic). Raises TimeoutError; RecursionError; ValueError, TypeError, OverflowError or
    ZeroDivisionError for what encodes no value."""
    if time.monotonic() > deadline:  # also between the items of a set, which may be chosen to collide
        raise TimeoutError
    if not isinstance(data, list):
        return data

    def all_of(items):
        return (decode(item, dereference, deadline) for item in items)

    kind, content = data
    if kind == "reference":
        return dereference(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in ("int", "decimal.Decimal"):
        if len(content) > DIGITS:
            raise ValueError("a number too long")
        if kind == "int":
            return int(content, 16)
        number = importlib.import_module("decimal").Decimal(str(content))
        if number.is_finite() and abs(number.adjusted()) > DIGITS:
            raise ValueError("an exponent too large")
        return number
    if not isinstance(content, list):
        raise ValueError(f"{kind!r} of {type(content).__name__}")
    if kind in COLLECTIONS:
        return dict.fromkeys(all_of(content)).keys() if kind == "keys" else COLLECTIONS[kind](all_of(content))
    if kind in ("dict", "items"):
        made = dict(map(all_of, content))
        return made if kind == "dict" else made.items()
    if kind == "namedtuple":
        name, fields, items = content
        if len(name) + sum(map(len, fields)) > NAMES:
            raise ValueError("names too long")
        return _named(name, tuple(fields))._make(all_of(items))
    if kind in NUMBERS:
        numbers = [*all_of(content)]
        if all(type(number) in (int, float) for number in numbers):
            module, _, name = kind.partition(".")
            return getattr(importlib.import_module(module), name)(*numbers)
    raise ValueError(f"unknown kind {kind!r}")
