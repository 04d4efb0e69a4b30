"""The parser under several threads, whatever the garbage collector does on the way."""

from __future__ import annotations

import ast
import gc
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_r1 import syntax

SOURCE = Path(ast.__file__).read_text()[:30_000].rpartition("\n\n\n")[0]


class Slow:
    """Garbage whose finalizer lets another thread run."""

    def __init__(self) -> None:
        self.own = self

    def __del__(self) -> None:
        time.sleep(0.0001)


@pytest.fixture
def busy():
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


def at_depth(depth: int, call):
    return call() if depth == 0 else at_depth(depth - 1, call)


def test_threads_parse_side_by_side(busy):
    """With ast.parse in its place, this ends in SystemErrors under CPython 3.11."""
    errors: list[Exception] = []

    def work(depth: int) -> None:
        for _ in range(20):
            for _ in range(5):
                Slow()
            try:
                at_depth(depth, lambda: syntax.parse(SOURCE))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(7 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_it_is_asts_own():
    assert ast.dump(syntax.parse("a + 1", mode="eval")) == ast.dump(ast.parse("a + 1", mode="eval"))
    with pytest.raises(SyntaxError):
        syntax.parse("def (")
