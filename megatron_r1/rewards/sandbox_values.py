"""Values as bytes between a program's process and its test's: plain data, and value types of the standard library.

Part of the code that every sandboxed interpreter starts with (sandbox_process.py joins it with sandbox_objects.py,
sandbox_peer.py, sandbox_tested.py and sandbox_inside.py), so it imports nothing at its top. Bytes from a program may be
hostile: decoding runs nothing of theirs, it only calls the constructors in REBUILT with plain data. What has no form
here is lent (sandbox_objects.py).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would cost every start some milliseconds
    from collections.abc import Callable
    from typing import Any

MAX_FRAME_BYTES = 4 << 20
MAX_DEPTH = 200


class Unsendable(Exception):  # noqa: N818
    """A value that has no form between processes."""


def encode(value: Any, lend: Callable[[Any], bytes] | None = None, depth: int = 0) -> bytes:
    """`value` as bytes: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, the
    types of VALUES, builtin types and functions, and containers of these; a subclass as its base. `lend` gives the
    bytes of anything else; without it iterators are sent as what they yield. Unsendable for the rest, and below
    MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise Unsendable(f"more than {MAX_DEPTH} levels of containers")
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        return framed(b"i", int.__format__(value, "x").encode())
    if isinstance(value, float):
        return framed(b"f", float.hex(value).encode())
    if isinstance(value, complex):
        return b"c" + encode(value.real) + encode(value.imag)
    if isinstance(value, str):
        return framed(b"s", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return framed(b"b", value)
    if isinstance(value, range):
        return b"r" + encode(value.start) + encode(value.stop) + encode(value.step)
    if (found := _value_type(value)) is not None:
        parts = [encode(part, lend, depth + 1) for part in (found, *VALUES[found](value))]
        return framed(b"V", b"".join(parts))
    if isinstance(value, dict):
        items = [encode(part, lend, depth + 1) for pair in dict.items(value) for part in pair]
        return framed(b"d", b"".join(items))
    for kind, tag in SEQUENCES:
        if isinstance(value, kind):
            return framed(tag, b"".join([encode(item, lend, depth + 1) for item in kind.__iter__(value)]))
    if type(value) is type(len) and BUILTIN_FUNCTIONS.get(value.__name__) is value:
        return framed(b"B", value.__name__.encode())
    if isinstance(value, type) and BUILTIN_TYPES.get(value.__name__) is value:
        return framed(b"C", value.__name__.encode())
    if lend is not None:
        return lend(value)
    if hasattr(type(value), "__next__"):
        items, size = [], 0
        iterator: Any = value
        for item in iterator:
            items.append(encode(item, lend, depth + 1))
            size += len(items[-1])
            if size > MAX_FRAME_BYTES:
                raise Unsendable(f"an iterator of more than {MAX_FRAME_BYTES} bytes")
        return framed(b"g", b"".join(items))
    raise Unsendable(f"a {type(value).__name__} cannot be sent between processes")


def decode(content: bytes, borrow: Callable[[list], Any] | None = None) -> Any:
    """The value that `encode` made these bytes from; `borrow` makes something of what was lent. ValueError, TypeError,
    OverflowError or ArithmeticError for other bytes, ImportError where a module is not there."""
    value, end = _decode(content, 0, len(content), 0, borrow)
    if end != len(content):
        raise ValueError("bytes after the value")
    return value


def framed(tag: bytes, body: bytes) -> bytes:
    return tag + str(len(body)).encode() + b":" + body


def _decode(content: bytes, at: int, limit: int, depth: int, borrow: Callable[[list], Any] | None) -> tuple[Any, int]:
    """The value at `at` and where it ends; no byte from `limit` on belongs to it."""
    if at >= limit or depth > MAX_DEPTH:
        raise ValueError("bytes that stop early, or too many levels")
    tag, at = content[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag in (b"c", b"r"):
        parts = []
        for _ in range(2 if tag == b"c" else 3):
            part, at = _decode(content, at, limit, depth + 1, None)
            parts.append(part)
        return (complex if tag == b"c" else range)(*parts), at
    colon = content.find(b":", at, at + 9)
    if colon < 0 or not content[at:colon].isdigit():
        raise ValueError("bytes without a length")
    at, end = colon + 1, colon + 1 + int(content[at:colon])
    if end > limit:
        raise ValueError("bytes that stop early")
    if tag in SCALARS:
        return SCALARS[tag](content[at:end]), end
    if tag not in CONTAINERS and (tag != b"L" or borrow is None):
        raise ValueError(f"unknown tag {tag!r}")
    items = []
    while at < end:
        item, at = _decode(content, at, end, depth + 1, borrow)
        items.append(item)
    if tag == b"L" and borrow is not None:
        return borrow(items), end
    return CONTAINERS[tag](items), end


BUILTIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object),
        *(type, map, filter, zip, enumerate, reversed),
        *(BaseException.__subclasses__()),
        *(Exception.__subclasses__()),
        *(ArithmeticError, LookupError, ZeroDivisionError, OverflowError, KeyError, IndexError, RecursionError),
        *(NotImplementedError, UnicodeError, FileNotFoundError, PermissionError, TimeoutError, ModuleNotFoundError),
    )
    if kind.__module__ == "builtins"
}
BUILTIN_FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(abs, all, any, ascii, bin, chr, divmod, format, hash, hex, isinstance, issubclass, iter, len, max, min, next),
        *(oct, ord, pow, repr, round, sorted, sum, callable, hasattr, print, id),
    )
}
SEQUENCES: tuple[tuple[Any, bytes], ...] = ((list, b"l"), (tuple, b"t"), (set, b"S"), (frozenset, b"z"))
SCALARS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda body: int(body, 16),
    b"f": lambda body: float.fromhex(body.decode()),
    b"s": lambda body: body.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"C": lambda body: BUILTIN_TYPES[body.decode()],
    b"B": lambda body: BUILTIN_FUNCTIONS[body.decode()],
}
CONTAINERS: dict[bytes, Callable[[list], Any]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"z": frozenset,
    b"g": iter,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    b"V": lambda items: _rebuilt(*items),
}


def _value_type(value: Any) -> str | None:
    """The name in VALUES of the type of `value` or of its nearest base that is there."""
    kind = type(value)
    if kind in (list, tuple, dict, set, frozenset):
        return None
    if isinstance(value, tuple) and kind is not tuple and hasattr(kind, "_fields"):
        return "namedtuple"
    for base in kind.__mro__:
        if (name := f"{base.__module__}.{base.__qualname__}") in VALUES:
            return name
    return None


def _named(value: Any) -> tuple:
    return type(value).__name__, [str(field) for field in value._fields], list(tuple.__iter__(value))


def _default_factory(value: Any) -> Any:
    """Builtin types only: another factory is the program's own, and missing keys then raise KeyError in the test."""
    factory = value.default_factory
    return factory if BUILTIN_TYPES.get(getattr(factory, "__name__", "")) is factory else None


def _match(value: Any) -> tuple:
    pattern = value.re
    return (
        pattern.pattern,
        int(pattern.flags),
        value.string,
        value.pos,
        value.endpos,
        [list(pair) for pair in value.regs],
    )


VALUES: dict[str, Callable[[Any], tuple]] = {
    "namedtuple": _named,
    "builtins.bytearray": lambda value: (bytes(value),),
    "builtins.memoryview": lambda value: (value.tobytes(),),
    "builtins.slice": lambda value: (value.start, value.stop, value.step),
    "builtins.ellipsis": lambda value: (),
    "builtins.dict_keys": lambda value: (list(value),),
    "builtins.dict_values": lambda value: (list(value),),
    "builtins.dict_items": lambda value: (list(value),),
    "builtins.odict_keys": lambda value: (list(value),),
    "builtins.odict_values": lambda value: (list(value),),
    "builtins.odict_items": lambda value: (list(value),),
    "builtins.mappingproxy": lambda value: (dict(value),),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "collections.OrderedDict": lambda value: ([list(pair) for pair in value.items()],),
    "collections.defaultdict": lambda value: (_default_factory(value), [list(pair) for pair in dict.items(value)]),
    "collections.Counter": lambda value: ([list(pair) for pair in dict.items(value)],),
    "collections.ChainMap": lambda value: (list(value.maps),),
    "collections.UserDict": lambda value: (value.data,),
    "collections.UserList": lambda value: (value.data,),
    "collections.UserString": lambda value: (value.data,),
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "datetime.datetime": lambda value: (
        [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond],
        value.tzinfo,
        value.fold,
    ),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (
        [value.hour, value.minute, value.second, value.microsecond],
        value.tzinfo,
        value.fold,
    ),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.timezone": lambda value: (value.utcoffset(None), value.tzname(None)),
    "array.array": lambda value: (value.typecode, value.tolist()),
    "uuid.UUID": lambda value: (str(value),),
    "pathlib.PurePosixPath": lambda value: (str(value),),
    "re.Pattern": lambda value: (value.pattern, int(value.flags)),
    "re.Match": _match,
}
"""Type to the plain data that it is rebuilt from."""


def _from_module(name: str) -> Any:
    """The class `module.name`. Only names of VALUES come here."""
    module, _, kind = name.rpartition(".")
    return getattr(__import__(module), kind)


def _named_tuple(name: str, fields: list[str], values: list) -> Any:
    if not all(isinstance(word, str) and word.isascii() and len(word) < 100 for word in (name, *fields)):
        raise ValueError("a named tuple with odd names")  # namedtuple() builds source of them
    from collections import namedtuple

    return namedtuple(name, fields)(*values)


def _pattern(pattern: Any, flags: int) -> Any:
    import re

    return re.compile(pattern, flags & ~int(re.DEBUG))


def _found(pattern: Any, flags: int, text: Any, start: int, end: int, regs: list) -> Any:
    """The match with these spans, found again: an object that only a match at this place can make."""
    compiled, at, wanted = _pattern(pattern, flags), regs[0][0], tuple(tuple(pair) for pair in regs)
    for find in (compiled.match, compiled.fullmatch):
        for began in dict.fromkeys((start, at)):
            if (match := find(text, began, end)) is not None and match.regs == wanted:
                return match
    if (match := compiled.search(text, start, end)) is not None and match.regs == wanted:
        return match
    raise ValueError("a match that its own pattern does not give")


def _moment(kind: str) -> Callable[..., Any]:
    return lambda fields, zone, fold: _from_module(kind)(*fields, tzinfo=zone, fold=fold)


REBUILT: dict[str, Callable[..., Any]] = {
    "namedtuple": _named_tuple,
    "builtins.bytearray": bytearray,
    "builtins.memoryview": memoryview,
    "builtins.slice": slice,
    "builtins.ellipsis": lambda: ...,
    "builtins.dict_keys": lambda keys: dict.fromkeys(keys).keys(),
    "builtins.dict_values": lambda values: dict(enumerate(values)).values(),
    "builtins.dict_items": lambda pairs: dict(pairs).items(),
    "builtins.odict_keys": lambda keys: dict.fromkeys(keys).keys(),
    "builtins.odict_values": lambda values: dict(enumerate(values)).values(),
    "builtins.odict_items": lambda pairs: dict(pairs).items(),
    "builtins.mappingproxy": lambda items: type(type.__dict__)(items),
    "collections.Counter": lambda pairs: _from_module("collections.Counter")(dict(pairs)),
    "collections.ChainMap": lambda maps: _from_module("collections.ChainMap")(*maps),
    "datetime.datetime": _moment("datetime.datetime"),
    "datetime.time": _moment("datetime.time"),
    "re.Pattern": _pattern,
    "re.Match": _found,
}
"""How those are rebuilt that their class does not rebuild from the same data."""


def _rebuilt(name: str, *parts: Any) -> Any:
    if name not in VALUES:
        raise ValueError(f"no value type {name!r}")
    return (REBUILT[name] if name in REBUILT else _from_module(name))(*parts)
