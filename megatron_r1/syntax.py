"""Python's own parser, for several threads.

CPython counts the depth of its trees once for an interpreter, not for a thread. A thread that is put aside within
ast.parse, by a finalizer that the garbage collector runs, leaves the count to the next one, whose parse ends in
"SystemError: AST constructor recursion depth mismatch".
"""

from __future__ import annotations

import ast
import threading
from typing import Any

_one_at_a_time = threading.RLock()


def parse(source: str | bytes, filename: str = "<unknown>", mode: str = "exec") -> Any:
    """ast.parse(source, filename, mode): an ast.Module, or an ast.Expression with mode "eval". SyntaxError, ValueError,
    MemoryError and RecursionError as it raises them."""
    with _one_at_a_time:
        return ast.parse(source, filename, mode)
