"""What runs inside the sandbox ahead of a program: the three modes, and plain values as bytes between two processes.

sandbox.py compiles this file and hands the code to every sandboxed interpreter; it imports nothing, so that a start
stays cheap. Mode "main" runs a program as a script. Mode "serve" loads it as a module and answers calls. Mode "check"
runs an assertion in another sandbox, where the program's function is a stand-in that asks the "serve" process: the
program's code and the expected values are never in one process, and the only way to make the assertion pass is to
send back values that satisfy it.
"""

from __future__ import annotations

import builtins
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would cost every start some milliseconds
    from collections.abc import Callable
    from typing import Any

PROGRAM, BOOT, INCOMING, OUTGOING = 3, 4, 5, 6
"""Descriptors at the start of a program; the last two only where it serves calls or checks."""

PASSED, WRONG, RAISED, GONE, UNSENDABLE, OVERSIZED = 80, 81, 82, 83, 84, 85
"""Exit statuses of mode "check". Only trusted code runs there, so they can be believed."""

MAX_FRAME_BYTES = 4 << 20
MAX_DEPTH = 200


class Unsendable(Exception):  # noqa: N818
    """A value that has no plain form."""


class Gone(BaseException):
    """The process that serves calls has closed its end. No assertion can catch it as an Exception."""


class Oversized(BaseException):
    """A reply longer than MAX_FRAME_BYTES."""


def encode(value: Any, depth: int = 0) -> bytes:
    """`value` as bytes: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range and
    iterators of these; a subclass as its base. Unsendable for anything else, and below MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise Unsendable(f"more than {MAX_DEPTH} levels of containers")
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        return _framed(b"i", int.__format__(value, "x").encode())
    if isinstance(value, float):
        return _framed(b"f", float.hex(value).encode())
    if isinstance(value, complex):
        return b"c" + encode(value.real) + encode(value.imag)
    if isinstance(value, str):
        return _framed(b"s", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed(b"b", value)
    if isinstance(value, range):
        return b"r" + encode(value.start) + encode(value.stop) + encode(value.step)
    if isinstance(value, dict):
        items = [encode(part, depth + 1) for pair in dict.items(value) for part in pair]
        return _framed(b"d", b"".join(items))
    for kind, tag in SEQUENCES:
        if isinstance(value, kind):
            return _framed(tag, b"".join([encode(item, depth + 1) for item in kind.__iter__(value)]))
    if hasattr(value, "__next__"):
        items, size = [], 0
        for item in value:
            items.append(encode(item, depth + 1))
            size += len(items[-1])
            if size > MAX_FRAME_BYTES:
                raise Unsendable(f"an iterator of more than {MAX_FRAME_BYTES} bytes")
        return _framed(b"g", b"".join(items))
    raise Unsendable(f"a {type(value).__name__} cannot be sent between processes")


def decode(content: bytes) -> Any:
    """The value that `encode` made these bytes from. ValueError, TypeError or OverflowError for other bytes: they may
    come from a hostile program, and nothing in them is run."""
    value, end = _decode(content, 0, len(content), 0)
    if end != len(content):
        raise ValueError("bytes after the value")
    return value


def _framed(tag: bytes, body: bytes) -> bytes:
    return tag + str(len(body)).encode() + b":" + body


def _decode(content: bytes, at: int, limit: int, depth: int) -> tuple[Any, int]:
    """The value at `at` and where it ends; no byte from `limit` on belongs to it."""
    if at >= limit or depth > MAX_DEPTH:
        raise ValueError("bytes that stop early, or too many levels")
    tag, at = content[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag in (b"c", b"r"):
        parts = []
        for _ in range(2 if tag == b"c" else 3):
            part, at = _decode(content, at, limit, depth + 1)
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
    if tag not in CONTAINERS:
        raise ValueError(f"unknown tag {tag!r}")
    items = []
    while at < end:
        item, at = _decode(content, at, end, depth + 1)
        items.append(item)
    return CONTAINERS[tag](items), end


SEQUENCES: tuple[tuple[Any, bytes], ...] = ((list, b"l"), (tuple, b"t"), (set, b"S"), (frozenset, b"z"))
SCALARS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda body: int(body, 16),
    b"f": lambda body: float.fromhex(body.decode()),
    b"s": lambda body: body.decode("utf-8", "surrogatepass"),
    b"b": bytes,
}
CONTAINERS: dict[bytes, Callable[[list], Any]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"z": frozenset,
    b"g": iter,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


def send(file: Any, content: bytes) -> None:
    """One frame into an unbuffered file. BrokenPipeError where nobody reads it any more."""
    left = memoryview(str(len(content)).encode() + b"\n" + content)
    while left:
        left = left[file.write(left) :]


def receive(file: Any) -> bytes:
    """One frame. Gone at the end of the file or for a broken frame, Oversized beyond MAX_FRAME_BYTES."""
    length = file.readline(12).strip()
    if not length.isdigit():
        raise Gone
    if int(length) > MAX_FRAME_BYTES:
        raise Oversized
    content = file.read(int(length))
    if len(content) < int(length):
        raise Gone
    return content


def load(name: str, text: bytes) -> dict[str, Any]:
    """Runs `text` as the module `name`; its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  (python -S leaves them out)
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def serve(text: bytes, calls: Any, replies: Any) -> None:
    """Answers calls of functions of the program, (entry point, arguments, keyword arguments) each, until no more
    can come."""
    names = load("solution", text)
    while True:
        try:
            entry_point, arguments, keywords = decode(receive(calls))
        except Gone:
            return
        try:
            reply = encode((True, eval(entry_point, names)(*arguments, **keywords)))
        except Exception as error:
            reply = encode((False, type(error).__name__, str(error)[:200]))
        send(replies, reply)


def check(test: bytes, replies: Any, calls: Any) -> int:
    """Runs the assertion of `test`, an encoded (entry point, statements); the exit status that says how it went."""
    entry_point, statements = decode(test)
    lost: list[int] = []  # survives a bare `except:` of the test
    raised: list[Exception] = []

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        call = encode((entry_point, arguments, keywords))
        try:
            send(calls, call)
            reply: Any = decode(receive(replies))
        except (Gone, BrokenPipeError):
            lost.append(GONE)
            raise Gone from None
        except Oversized:
            lost.append(OVERSIZED)
            raise
        good, *rest = reply
        if good is True:
            return rest[0]
        name, message = rest
        kind: Any = getattr(builtins, name, None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        try:
            raised.append(kind(message) if known else RuntimeError(f"{name}: {message}"))
        except TypeError:  # an exception like UnicodeDecodeError, which takes more than a message
            raised.append(RuntimeError(f"{name}: {message}"))
        raise raised[-1]

    status = PASSED
    try:
        exec(compile(statements, "test.py", "exec", dont_inherit=True), {"__name__": "test", "candidate": candidate})
    except (Gone, Oversized):
        pass
    except Unsendable as error:
        print(f"the test cannot be put: {error}", file=sys.stderr)
        status = UNSENDABLE
    except Exception as error:
        status = RAISED if raised and error is raised[-1] else WRONG
        print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
    return lost[0] if lost else status


def main() -> None:
    """In a sandboxed interpreter: the mode is the only argument."""
    mode = sys.argv[1]
    open(BOOT, "rb").close()
    with open(PROGRAM, "rb") as file:
        text = file.read()
    if mode == "main":
        load("__main__", text)
        return
    with open(INCOMING, "rb") as incoming, open(OUTGOING, "wb", 0) as outgoing:
        if mode == "serve":
            serve(text, incoming, outgoing)
        else:
            sys.exit(check(text, incoming, outgoing))


if __name__ == "__main__":
    main()
