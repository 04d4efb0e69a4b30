"""Rows of a data file: one JSON object a line (or one JSON array of them, or CSV), strictly.

Every reader of such files goes through here, so that they take and refuse the same. Gzip is read too, and a byte-order
mark is passed over. Python's own reader takes more than JSON (NaN, 1e400 as infinity, a key twice, half a surrogate
pair): here each is refused by name. Left out: what a row means.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from megatron_r1.data.table import read_table
from megatron_r1.errors import DataError

MAX_LEVELS = 100
"""Of arrays and objects in each other; what handles rows later may recurse."""
MAX_DIGITS = 4300
"""Of an integer, as Python's own limit: reading more takes time that grows with the square."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FOREIGN = (
    (b"\xff\xfe", "UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"{\0", "UTF-16 text without a mark; write it as UTF-8: iconv -f UTF-16LE -t UTF-8"),
    (b"\0{", "UTF-16 text without a mark; write it as UTF-8: iconv -f UTF-16BE -t UTF-8"),
    (b"PAR1", "a Parquet file; write it as JSON lines, e.g. pandas.read_parquet(...).to_json(..., lines=True)"),
    (b"ARROW1", "an Arrow file; write it as JSON lines"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first: zstd -d"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first: xz -d"),
    (b"BZh", "compressed by bzip2; unpack it first: bzip2 -d"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself; fetch it: git lfs pull"),
    (b"<!DOCTYPE", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)
"""How other files begin, and what to do with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`fields` of one object. `number` counts lines (items of an array) from 1; `where` names file and number."""

    where: str
    number: int
    fields: dict[str, Any]


def read_rows(
    path: Path, *, what: str, holds: str, on_fault: Callable[[DataError], None] | None = None
) -> Iterator[Row]:
    """The file's rows in order, streamed (an array is read as a whole). `what` names the rows and `holds` their fields,
    for errors. DataError, with file, line and reason, for what cannot be read and for a file without rows; with
    `on_fault` it is told of a line that is no row, and the next one is read.

    Blank lines at the end are passed over; elsewhere one is refused, as it may stand for a row that was lost.
    """
    found = 0

    def told(error: DataError) -> None:
        nonlocal found
        found += 1
        (on_fault or _raise)(error)

    try:
        with open(path, "rb") as raw, _unpacked(raw) as file:
            for row in _rows(file, path, holds, told):
                found += 1
                yield row
    except OSError as error:  # gzip.BadGzipFile is one, without a strerror
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check data.files") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from error
    if not found:
        raise DataError(f"{path}: the file has no {what}; expected one JSON object a line")


def _rows(file: BinaryIO, path: Path, holds: str, told: Callable[[DataError], None]) -> Iterator[Row]:
    first = _first_line(file, path)
    if ".csv" in path.suffixes:
        for number, cells in read_table(itertools.chain([first] if first else [], file), path):
            yield Row(where=f"{path}, line {number}", number=number, fields=cells)
    elif first.lstrip().startswith(b"["):  # a row is an object, so this can only be one array
        yield from _array(first + file.read(), path, holds)
    else:
        yield from _lines(first, file, path, holds, told)


def parse_row(line: bytes, where: str, holds: str) -> dict[str, Any]:
    """The JSON object of one line. DataError, with `where` and the reason, if it is none."""
    value = _parse(line, where, holds)
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}; expected an object with {holds}")
    return value


def _unpacked(raw: BinaryIO) -> BinaryIO:
    """The file, or what is in it if it is gzip."""
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw


def _first_line(file: BinaryIO, path: Path) -> bytes:
    line = file.readline()
    for beginning, reason in FOREIGN:
        if line.startswith(beginning):
            raise DataError(f"{path}: {reason}")
    return line.removeprefix(BYTE_ORDER_MARK)


def _array(content: bytes, path: Path, holds: str) -> Iterator[Row]:
    for number, item in enumerate(_parse(content, str(path), holds), start=1):
        where = f"{path}, item {number}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: a JSON {type(item).__name__}; expected an object with {holds}")
        yield Row(where=where, number=number, fields=item)


def _lines(first: bytes, file: BinaryIO, path: Path, holds: str, told: Callable[[DataError], None]) -> Iterator[Row]:
    blank = 0
    line, number = first, 1
    while line:
        where = f"{path}, line {number}"
        if not line.strip():
            blank = blank or number
        else:
            if blank:
                told(DataError(f"{path}, line {blank}: empty line; expected a JSON object with {holds}"))
                blank = 0
            try:
                fields = parse_row(line, where, holds)
            except DataError as error:
                told(error)
            else:
                yield Row(where=where, number=number, fields=fields)
        line, number = file.readline(), number + 1


def _raise(error: DataError) -> NoReturn:
    raise error


def _parse(content: bytes, where: str, holds: str) -> Any:
    content = content.removeprefix(BYTE_ORDER_MARK)  # of a file that was appended to another one
    if b"\0" in content:
        raise DataError(f"{where}: NUL bytes; the file is no UTF-8 text, or was not written to its end")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise DataError(f"{where}: empty line; expected a JSON object with {holds}")
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise DataError(f"{where}: more than {MAX_LEVELS} levels of brackets; rows are flatter than that") from error
    except json.JSONDecodeError as error:
        hint = "; an object must stand on one line" if text.strip() in ("{", "[") else ""
        raise DataError(f"{where}: not valid JSON: {error}{hint}") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if text.count("[") + text.count("{") > MAX_LEVELS and _levels(value) > MAX_LEVELS:
        raise DataError(f"{where}: more than {MAX_LEVELS} levels of brackets; rows are flatter than that")
    if SURROGATE.search(text) and (place := _unpaired(value)) is not None:
        raise DataError(f"{where}: {place} has an unpaired surrogate, which is no text")
    return value


def _levels(value: Any) -> int:
    """Of arrays and objects in each other."""
    count, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, dict | list)]:
        count += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return count


def _unpaired(value: Any, place: str = "") -> str | None:
    """Where in `value` a string stands that UTF-8 cannot hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return place or "a string"
    if isinstance(value, dict):
        if any(_unpaired(key) for key in value):
            return f"a key of {place or 'the object'}"
        return next(filter(None, (_unpaired(item, f"{place}.{key}".strip(".")) for key, item in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (_unpaired(item, f"{place}[{i}]") for i, item in enumerate(value))), None)
    return None


SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one of them")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; at most {MAX_DIGITS} are read: write it as text")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"the number {text:.40} is beyond the largest double and would be infinite: write it as text")
    if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise ValueError(f"the number {text:.40} is below the smallest double and would be 0: write it as text")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON and no number; leave the row out, or write null")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant)
