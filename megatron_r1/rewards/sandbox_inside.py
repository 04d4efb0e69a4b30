"""What runs inside the sandbox ahead of a program, in one of three modes.

sandbox_process.py compiles this file behind the others of the boot code (its BOOT_MODULES) and hands the code to every
sandboxed interpreter; it imports nothing, so that a start stays cheap. Mode "main" runs a program as a script. Mode
"serve" loads it as a module and answers. Mode "check" runs an assertion in another sandbox, where the program's names
are stand-ins that ask the "serve" process: the program's code and the expected values are never in one process, and
the only way to make the assertion pass is to send back values that satisfy it.
"""

from __future__ import annotations

import builtins
import sys

from megatron_r1.rewards.sandbox_objects import (
    FUNCTION,
    ITERATOR,
    OBJECT,
)
from megatron_r1.rewards.sandbox_peer import CALLBACK, Peer
from megatron_r1.rewards.sandbox_tested import check
from megatron_r1.rewards.sandbox_values import encode, framed

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would cost every start some milliseconds
    from collections.abc import Callable
    from typing import Any

PROGRAM, BOOT, INCOMING, OUTGOING = 3, 4, 5, 6
"""Descriptors at the start of a program; the last two only where it serves calls or checks."""

SLOW_ITEM_SECONDS = 0.01


class Shelf:
    """Objects of the program that the test's process knows by number, and functions of the test's that it was lent."""

    def __init__(self) -> None:
        self.peer: Any = None
        self._kept: list[Any] = []
        self._number: dict[int, int] = {}
        self._callbacks: dict[int, Any] = {}
        self._number_of_callback: dict[int, int] = {}

    def lend(self, value: Any) -> bytes:
        if id(value) in self._number_of_callback:
            return framed(b"L", encode(CALLBACK) + encode(self._number_of_callback[id(value)]))
        number = self._number.setdefault(id(value), len(self._kept))
        if number == len(self._kept):
            self._kept.append(value)
        name = type(value).__name__
        if hasattr(type(value), "__next__"):
            kind = ITERATOR
        elif name in FUNCTION_TYPES:
            kind, name = FUNCTION, getattr(value, "__name__", name)
        else:
            kind = OBJECT
        return framed(b"L", encode(kind) + encode(number) + encode(str(name)[:100]))

    def borrow(self, parts: list) -> Any:
        kind, number = parts
        if kind != CALLBACK:
            return self._kept[number]
        if number not in self._callbacks:

            def callback(*arguments: Any, **keywords: Any) -> Any:
                good, *rest = self.peer.ask(CALLBACK, number, arguments, keywords)
                if good is True:
                    return rest[0]
                kind = getattr(builtins, rest[0][0], RuntimeError)
                raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(*rest[1])

            self._callbacks[number] = callback
            self._number_of_callback[id(callback)] = number
        return self._callbacks[number]


FUNCTION_TYPES = ("function", "builtin_function_or_method", "method", "partial", "method-wrapper", "_lru_cache_wrapper")


def serve(text: bytes, incoming: Any, outgoing: Any, supplied: bool) -> None:
    """Answers what is asked of the program, until no more can come."""
    names = load("solution", text, supplied)
    shelf = Shelf()

    def answer(operation: str, *operands: Any) -> Any:
        if operation == "name":
            return eval(operands[0], names)
        if operation in ("run", "call"):
            what, arguments, keywords, bring_home = operands
            function = eval(what, names) if operation == "run" else what
            result = function(*arguments, **keywords)
            return result, (arguments if bring_home else ())
        return ANSWERS[operation](*operands)

    shelf.peer = Peer(incoming, outgoing, answer, shelf.lend, shelf.borrow)
    shelf.peer.serve()


def _operate(name: str, left: Any, right: Any) -> Any:
    import operator

    return getattr(operator, f"__{name}__")(left, right)


def _next(iterator: Any, most: int) -> tuple[list, bool]:
    """Up to `most` items, fewer where they come slowly; whether those were the last."""
    import time

    items: list[Any] = []
    began = time.monotonic()
    while len(items) < most and (not items or time.monotonic() - began < SLOW_ITEM_SECONDS):
        try:
            items.append(next(iterator))
        except StopIteration:
            return items, True
    return items, False


def _fields(value: Any) -> dict:
    """The fields of an object, of __dict__ and __slots__."""
    fields = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                fields[name] = getattr(value, name)
    return fields


ANSWERS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "item": lambda value, key: value[key],
    "set_item": lambda value, key, item: value.__setitem__(key, item),
    "delete_item": lambda value, key: value.__delitem__(key),
    "iterate": iter,
    "next": _next,
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: value.__exit__(None, None, None) and None,
    "length": len,
    "truth": bool,
    "send": lambda iterator, value: iterator.send(value),
    "close": lambda iterator: iterator.close(),
    "negative": lambda value: -value,
    "absolute": abs,
    "integer": int,
    "real": float,
    "text": str,
    "representation": repr,
    "is_instance": isinstance,
    "equal": lambda left, right: bool(left == right),
    "fields": _fields,
    "operate": _operate,
}


def load(name: str, text: bytes, supplied: bool) -> dict[str, Any]:
    """Runs `text` as the module `name`, with imports supplied where that is asked for; its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  (python -S leaves them out)
    code = compile(text, "program.py", "exec", dont_inherit=True)
    if supplied:
        supply(code)
    exec(code, module.__dict__)
    return module.__dict__


SUPPLIED = {
    "": "bisect collections copy datetime decimal fractions functools heapq itertools json math operator random re "
    "string sys time typing",
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "dataclasses": "dataclass field",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement groupby islice pairwise permutations "
    "product zip_longest",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log10 log2 prod sqrt",
    "operator": "itemgetter",
    "string": "ascii_letters ascii_lowercase ascii_uppercase",
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generic Generator Iterable Iterator List Literal Mapping "
    "NamedTuple Optional Sequence Set Tuple TypeVar Union",
}
"""What LeetCode and LiveCodeBench import for a program, by module; "" for the modules themselves."""


def supply(code: Any) -> None:
    """Makes those names of SUPPLIED that a program uses known to it, as builtins are: its own definitions go first."""
    used, waiting = set(), [code]
    while waiting:
        part = waiting.pop()
        used.update(part.co_names)
        waiting += [constant for constant in part.co_consts if type(constant) is type(code)]
    for module, names in SUPPLIED.items():
        for name in used.intersection(names.split()):
            found = __import__(module or name)
            setattr(builtins, name, getattr(found, name) if module else found)


def main() -> None:
    """In a sandboxed interpreter: the mode is the only argument, with "+" behind it where imports are supplied."""
    mode, supplied = sys.argv[1].rstrip("+"), sys.argv[1].endswith("+")
    open(BOOT, "rb").close()
    with open(PROGRAM, "rb") as file:
        text = file.read()
    if mode == "main":
        load("__main__", text, supplied)
        return
    with open(INCOMING, "rb") as incoming, open(OUTGOING, "wb", 0) as outgoing:
        if mode == "serve":
            serve(text, incoming, outgoing, supplied)
        else:
            sys.exit(check(text, incoming, outgoing))


if __name__ == "__main__":
    main()
