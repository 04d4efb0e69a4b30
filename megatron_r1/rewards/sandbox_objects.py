"""What stands, in the test's process, for functions, iterators and objects that live in the program's process.

They are asked by name and answer with values, which the test then compares: a program can only pass by sending values
that satisfy the assertion. So nothing that the test expects may travel to the program in a comparison, and no operator
of a program's class may decide one alone: a stand-in is equal to no plain value, and to another stand-in only if the
program says so and their fields are equal one by one; order and arithmetic with plain values, and `in`, are refused.
Part of the boot code, see sandbox_values.py.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FUNCTION, ITERATOR, OBJECT = "function", "iterator", "object"
MOST_ITEMS = 1024
"""Items of an iterator that are asked for at once, at most."""


class NoValue(Exception):  # noqa: N818
    """Something of the program's stands where the test needs a value."""


class Function:
    """A function of the program: it can be called, and nothing else. As a result it is no answer."""

    def __init__(self, ask: Callable[..., Any], handle: int, name: str) -> None:
        self._r1_ask, self._r1_handle, self._r1_name = ask, handle, name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._r1_ask("call", self, arguments, keywords, False)[0]

    def r1_in_place(self, *arguments: Any, **keywords: Any) -> Any:
        """A call whose result nobody reads: what it did to lists, dicts and sets is brought home."""
        result, changed = self._r1_ask("call", self, arguments, keywords, True)
        for mine, theirs in zip(arguments, changed, strict=True):
            update(mine, theirs)
        return result

    def __bool__(self) -> bool:
        raise NoValue(f"the truth of the program's {self._r1_name}: a function is no answer, call it")

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class Expression(Function):
    """What an expression of the program's gives, evaluated anew for every call: the entry point."""

    def __init__(self, ask: Callable[..., Any], expression: str) -> None:
        super().__init__(ask, -1, expression)


class Iterator:
    """An iterator of the program. It may have no end: items come one by one where the test takes them so, and more and
    more at once where a loop does."""

    def __init__(self, ask: Callable[..., Any], handle: int, name: str) -> None:
        self._r1_ask, self._r1_handle, self._r1_name = ask, handle, name
        self._items: list[Any] = []
        self._wanted, self._ended, self._in_loop = 1, False, False

    def __iter__(self) -> Iterator:
        self._in_loop = True
        return self

    def send(self, value: Any) -> Any:
        """As a generator's."""
        return self._r1_ask("send", self, value)

    def close(self) -> None:
        self._items, self._ended = [], True
        self._r1_ask("close", self)

    def __next__(self) -> Any:
        if not self._items and not self._ended:
            items, self._ended = self._r1_ask("next", self, self._wanted)
            self._items = list(items)[::-1]
            self._wanted = min(2 * self._wanted, MOST_ITEMS) if self._in_loop else 1
        if not self._items:
            raise StopIteration
        return self._items.pop()


class Remote(Function):
    """An object or a class of the program's: attributes, items, calls, truth, length and text are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{name} of an object of the program's")
        return self._r1_ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_r1_ask", "_r1_handle", "_r1_name"):
            object.__setattr__(self, name, value)
        else:
            self._r1_ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._r1_ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._r1_ask("set_item", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._r1_ask("delete_item", self, key)

    def __iter__(self) -> Any:
        return iter(self._r1_ask("iterate", self))

    def __enter__(self) -> Any:
        return self._r1_ask("enter", self)

    def __exit__(self, *exception: object) -> None:
        self._r1_ask("exit", self)

    def __len__(self) -> int:
        return self._r1_ask("length", self)

    def __bool__(self) -> bool:
        return self._r1_ask("truth", self) is True

    def __neg__(self) -> Any:
        return self._r1_ask("negative", self)

    def __abs__(self) -> Any:
        return self._r1_ask("absolute", self)

    def __int__(self) -> int:
        return self._r1_ask("integer", self)

    def __float__(self) -> float:
        return self._r1_ask("real", self)

    def __str__(self) -> str:
        return self._r1_ask("text", self)

    def __repr__(self) -> str:
        return self._r1_ask("representation", self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and self._r1_ask("is_instance", value, self) is True

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Remote):
            return self is other
        return self._r1_ask("equal", self, other) is True and same_fields(self, other)

    __hash__ = object.__hash__

    def __contains__(self, value: Any) -> bool:
        raise NoValue("`in` an object of the program's: the program would decide; look at its items")


def _operation(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: Any, other: Any) -> Any:
        if not isinstance(other, Remote):
            raise NoValue(f"{name} of an object of the program's and a plain value: the program would decide")
        return self._r1_ask("operate", name, self, other)

    return operate


OPERATIONS = ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "and", "or", "xor")
for _name in OPERATIONS:
    setattr(Remote, f"__{_name}__", _operation(_name))
    if len(_name) > 2 or _name == "or":
        setattr(Remote, f"__r{_name}__", _operation(_name))


def same_fields(left: Any, right: Any, seen: tuple[tuple[int, int], ...] = ()) -> bool:
    """Whether two objects of the program's have equal fields, which are compared here and not by the program."""
    pair = (id(left), id(right))
    if pair in seen:
        return True
    return _same(left._r1_ask("fields", left), right._r1_ask("fields", right), (*seen, pair))


def _same(left: Any, right: Any, seen: tuple[tuple[int, int], ...]) -> bool:
    if isinstance(left, Remote) and isinstance(right, Remote):
        return left is right or same_fields(left, right, seen)
    if type(left) is not type(right):
        return bool(left == right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_same(one, two, seen) for one, two in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key], seen) for key in left)
    return bool(left == right)


def update(mine: Any, theirs: Any) -> None:
    """Makes a container of the test's equal to what the program has made of it; inner containers stay the same."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list):
        mine[:] = [_updated(*pair) for pair in zip(mine, theirs)] + theirs[len(mine) :]
    elif isinstance(mine, dict):
        merged = {key: _updated(mine[key], value) if key in mine else value for key, value in theirs.items()}
        mine.clear()
        mine.update(merged)
    elif isinstance(mine, set):
        mine.clear()
        mine.update(theirs)
    elif isinstance(mine, bytearray):
        mine[:] = theirs
    elif hasattr(mine, "maxlen") and hasattr(mine, "extend"):
        mine.clear()
        mine.extend(theirs)


def _updated(mine: Any, theirs: Any) -> Any:
    if type(mine) is type(theirs) and isinstance(mine, list | dict | set | bytearray):
        update(mine, theirs)
        return mine
    return theirs


def in_place(function: Any) -> Any:
    """What a statement that drops the result calls."""
    return function.r1_in_place if isinstance(function, Function) else function
