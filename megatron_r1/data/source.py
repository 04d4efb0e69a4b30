"""Problems from a function of the user's own: `--data.source my_module:problems` (docs/extending.md).

    def problems() -> Iterable[Problem]: ...

It is called once in every process that needs the problems, and must give the same ones in the same order each time: the
stream's position is all that a restart keeps.
"""

from __future__ import annotations

from megatron_r1.errors import DataError
from megatron_r1.plugins import imported, told
from megatron_r1.types import Problem


def problems_from(path: str) -> tuple[Problem, ...]:
    """DataError with file and line where the function raises, and for anything but different problems."""
    function = imported(path, "data.source")
    try:
        found = tuple(function())
    except Exception as error:
        raise DataError(f"data.source {path}{told(error)}") from error
    ids = set[str]()
    for number, problem in enumerate(found):
        if not isinstance(problem, Problem):
            raise DataError(f"data.source {path}: item {number} is a {type(problem).__name__}; expected a Problem")
        if problem.id in ids:
            raise DataError(f"data.source {path}: problem id {problem.id!r} is given twice; ids must be unique")
        ids.add(problem.id)
    if not found:
        raise DataError(f"data.source {path} gave no problems")
    return found
