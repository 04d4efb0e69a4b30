"""User code by its import path: `package.module:name` or `folder/file.py:name`.

Modules are found among the installed packages and then in the folder that the command runs in. Every process of a run
imports the same path again, so nothing has to be registered and nothing is pickled by value.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_r1.errors import ConfigError

PACKAGE = str(Path(__file__).parent)

_FILES: dict[str, Path] = {}
"""By module: the file that it was loaded from by its path."""


def is_import_path(word: str) -> bool:
    """Whether `word` is a path of this form, and not a name of ours."""
    module, colon, name = word.partition(":")
    return bool(colon and module and name) and "=" not in word


def imported(path: str, field: str) -> Any:
    """What `path` names. ConfigError with the field, and with the file and line where the user's own code fails."""
    module_name, _, name = path.partition(":")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else _from_path(module_name)
    except ConfigError as error:
        raise ConfigError([f"{field}: {path}: {fault}" for fault in error.faults]) from error
    except Exception as error:
        raise ConfigError([f"{field}: {path}: importing it fails{told(error)}"]) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError([f"{field}: {path}: {getattr(module, '__file__', None) or module_name} has no {name}"])
        found = getattr(found, part)
    return found


def import_path_of(kind: type) -> str:
    """The path that `imported` finds a class under again, from whatever folder: that of its file where it came from
    one."""
    file = _FILES.get(kind.__module__)
    return f"{file or kind.__module__}:{kind.__qualname__}"


def file_of(path: str) -> Path | None:
    """The file that holds what an import path names, once it has been imported; None for what has no file."""
    module = path.partition(":")[0]
    name = Path(module).stem if module.endswith(".py") else module
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file else None


def told(error: Exception) -> str:
    """` at FILE:LINE: KIND: MESSAGE` of an error in user code; without a place if none of it is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and not frame.filename.startswith(PACKAGE)]
    where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" at {error.filename}:{error.lineno}"
    return f"{where}: {type(error).__name__}: {error}"


def _from_path(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: a json.py there is not what our workers import
    missing = name
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing != name and not name.startswith(f"{missing}."):
            raise  # the user's module exists and lacks one of its own
    raise ConfigError([f"there is no module {missing} here in {Path.cwd()} or among the installed packages"])


def _from_file(file: Path) -> ModuleType:
    file = file.absolute()
    if not file.is_file():
        raise ConfigError([f"{file} does not exist"])
    # Under the file's own name, so that its classes have one that is the same in every process.
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    if known is not None or _elsewhere(file):
        raise ConfigError([f"{file.name} has the name of the installed module {file.stem}; rename the file"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    _FILES[file.stem] = file
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def _elsewhere(file: Path) -> bool:
    """Whether another module would be found under the file's name, which then stood for it in the whole process."""
    try:
        found = importlib.util.find_spec(file.stem)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin != str(file)
