"""What runs inside the sandbox ahead of a program: three modes, and the conversation between two of them.

sandbox.py compiles this file with sandbox_values.py and sandbox_objects.py before it and hands the code to every
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
    Expression,
    Function,
    Iterator,
    NoValue,
    Remote,
    in_place,
)
from megatron_r1.rewards.sandbox_values import MAX_FRAME_BYTES, Unsendable, decode, encode, framed

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would cost every start some milliseconds
    from collections.abc import Callable
    from typing import Any

PROGRAM, BOOT, INCOMING, OUTGOING = 3, 4, 5, 6
"""Descriptors at the start of a program; the last two only where it serves calls or checks."""

PASSED, WRONG, RAISED, GONE, UNSENDABLE, OVERSIZED = 80, 81, 82, 83, 84, 85
"""Exit statuses of mode "check". Only trusted code runs there, so they can be believed."""

REQUEST, REPLY = "request", "reply"
CALLBACK = "callback"
SLOW_ITEM_SECONDS = 0.01


class Gone(BaseException):
    """The process at the other end has closed it. No assertion can catch it as an Exception."""


class Oversized(BaseException):
    """A reply longer than MAX_FRAME_BYTES."""


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


class Peer:
    """One end of the conversation. While it waits for a reply it answers requests: a program may call what it was
    given. `answer` does what a request asks; `lend` and `borrow` are for what has no plain form."""

    def __init__(
        self,
        incoming: Any,
        outgoing: Any,
        answer: Callable[..., Any],
        lend: Callable[[Any], bytes],
        borrow: Callable[[list], Any],
    ) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.answer, self.lend, self.borrow = answer, lend, borrow

    def ask(self, *request: Any) -> list:
        """The other end's reply: [True, value], or [False, names of an exception's types, its arguments]."""
        send(self.outgoing, encode((REQUEST, *request), self.lend))
        while True:
            kind, *rest = decode(receive(self.incoming), self.borrow)
            if kind == REPLY:
                return rest
            self.reply(rest)

    def serve(self) -> None:
        """Answers requests until no more can come."""
        while True:
            try:
                content = receive(self.incoming)
            except Gone:
                return
            self.reply(decode(content, self.borrow)[1:])

    def reply(self, request: list) -> None:
        try:
            content = encode((REPLY, True, self.answer(*request)), self.lend)
        except Exception as error:
            content = self._failed(error)
        send(self.outgoing, content)

    def _failed(self, error: Exception) -> bytes:
        kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception)]
        try:
            return encode(
                (REPLY, False, kinds, [str(part)[:200] if type(part) is str else part for part in error.args])
            )
        except Exception:  # arguments that cannot be sent, or a program's class that misbehaves
            return encode((REPLY, False, kinds, [str(error)[:200]]))


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


class Tested:
    """The program as the test's process sees it. Only values come in, and objects only where the test names a class:
    a result of the program's own class would otherwise answer for a list or a text that the test expects."""

    def __init__(self, incoming: Any, outgoing: Any, objects: bool) -> None:
        self.objects = objects
        self.lost: list[int] = []  # survives a bare `except:` of the test
        self.raised: list[Exception] = []
        self.kinds: dict[str, type] = {}
        self._stand_ins: dict[int, Any] = {}
        self._callbacks: list[Any] = []
        self._peer = Peer(incoming, outgoing, self._call_back, self._lend, self._borrow)

    def ask(self, operation: str, *operands: Any) -> Any:
        """What the program answers; an exception of the program's is raised here."""
        if operation == "call" and isinstance(operands[0], Expression):
            operation, operands = "run", (operands[0]._r1_name, *operands[1:])
        try:
            good, *rest = self._peer.ask(operation, *operands)
        except (Gone, BrokenPipeError):
            self.lost.append(GONE)
            raise Gone from None
        except Oversized:
            self.lost.append(OVERSIZED)
            raise
        if good is True:
            return rest[0]
        raise self._remember(self._exception(*rest))

    def names(self, names: list[str], exceptions: list[str]) -> dict[str, Any]:
        """What stands for names that the test uses and does not define."""
        found: dict[str, Any] = {name: self.kind(name, Exception) for name in exceptions}
        for name in names:
            try:
                found[name] = self.ask("name", name)
            except Exception:  # no such name: the program's error, raised when the test calls it
                found[name] = Expression(self.ask, name)
        self.raised.clear()
        return found

    def kind(self, name: str, base: type) -> type:
        """The exception class that stands for the program's own class of that name."""
        return self.kinds.setdefault(name, type(name, (base,), {}))

    def _exception(self, kinds: list[str], arguments: list) -> Exception:
        base: Any = Exception
        for name in reversed(kinds):
            known = getattr(builtins, name, None)
            is_known = isinstance(known, type) and issubclass(known, Exception)
            base = known if is_known else self.kind(str(name), base)
        try:
            return base(*arguments)
        except TypeError:  # an exception like UnicodeDecodeError, which takes certain arguments
            return RuntimeError(f"{kinds[0]}: {arguments}"[:500])

    def _remember(self, error: Exception) -> Exception:
        self.raised.append(error)
        return error

    def _lend(self, value: Any) -> bytes:
        if isinstance(value, Expression):
            value = self.ask("name", value._r1_name)
        if isinstance(value, Function | Iterator):
            return framed(b"L", encode(OBJECT) + encode(value._r1_handle))
        if hasattr(value, "__next__"):
            return encode(value)
        if not callable(value) or getattr(value, "__module__", None) in ("builtins", "os", "posix", "operator"):
            raise Unsendable(f"a {type(value).__name__} cannot be sent to a program")
        if value not in self._callbacks:
            self._callbacks.append(value)
        return framed(b"L", encode(CALLBACK) + encode(self._callbacks.index(value)))

    def _borrow(self, parts: list) -> Any:
        if parts[0] == CALLBACK:
            return self._callbacks[parts[1]]
        kind, number, name = parts
        if kind == OBJECT and not self.objects:
            raise self._remember(RuntimeError(f"a {name} cannot be sent between processes"))
        if number not in self._stand_ins:
            made: Any = {FUNCTION: Function, ITERATOR: Iterator, OBJECT: Remote}[kind](self.ask, int(number), str(name))
            self._stand_ins[number] = made
        return self._stand_ins[number]

    def _call_back(self, operation: str, number: int, arguments: tuple, keywords: dict) -> Any:
        """A call of something that the test lent: all that a program may ask for."""
        if operation != CALLBACK:
            raise ValueError(f"no operation {operation!r}")
        try:
            return self._callbacks[number](*arguments, **keywords)
        except SystemExit as error:  # a function of the test's ends nothing with a status that the program chose
            raise RuntimeError("a function of the test's has exited") from error


def check(test: bytes, incoming: Any, outgoing: Any) -> int:
    """Runs the statements of `test`, an encoded (entry point, statements, names of the program's, names of its
    exceptions, whether objects may come); the exit status that says how it went."""
    entry_point, statements, names, exceptions, objects = decode(test)
    tested = Tested(incoming, outgoing, objects)
    status = PASSED
    try:
        program = tested.names([entry_point, *names] if objects else names, exceptions)
        candidate = program.get(entry_point) if isinstance(program.get(entry_point), Remote) else None
        candidate = Expression(tested.ask, entry_point) if candidate is None else candidate
        scope = {"__name__": "test", **program, "candidate": candidate, "r1_in_place": in_place}
        exec(compile(statements, "test.py", "exec", dont_inherit=True), scope)
    except (Gone, Oversized):
        status = GONE  # tested.lost says which, and goes before; an exception is never a pass
    except Unsendable as error:
        print(f"the test cannot be put: {error}", file=sys.stderr)
        status = UNSENDABLE
    except Exception as error:
        of_the_program = isinstance(error, NoValue) or (tested.raised and error is tested.raised[-1])
        status = RAISED if of_the_program else WRONG
        print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
    return tested.lost[0] if tested.lost else status


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
