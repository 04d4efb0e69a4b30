"""The test's process: an assertion runs here, and asks the program's process for what it tests.

Part of the boot code, see sandbox_values.py.
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
from megatron_r1.rewards.sandbox_peer import CALLBACK, Gone, Oversized, Peer
from megatron_r1.rewards.sandbox_values import Unsendable, decode, encode, framed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PASSED, WRONG, RAISED, GONE, UNSENDABLE, OVERSIZED = 80, 81, 82, 83, 84, 85
"""Exit statuses of mode "check". Only trusted code runs there, so they can be believed."""


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
