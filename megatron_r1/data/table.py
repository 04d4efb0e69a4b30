"""Rows of a CSV file, as some publishers write their problems (GPQA): the first line names columns, all are text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_r1.errors import DataError


def read_table(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line on which a row ends, its texts by column). DataError, with file and line, for what is no such table."""
    reader = csv.reader((_text(line, number, path) for number, line in enumerate(lines, start=1)), strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{path}, line 1: a column stands twice in {columns}; the first line must name the columns")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells; the first line names {len(columns)} columns"
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def _text(line: bytes, number: int, path: Path) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from error
