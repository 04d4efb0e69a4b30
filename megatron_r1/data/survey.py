"""What a file of problems looks like: in which forms its rows are, and which keys look like misspelt ones of ours."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.data.forms import KEPT, OURS_TOO, form_of
from megatron_r1.data.lines import read_rows

OPTIONAL = ("id", *KEPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Rows by the name of their form, and by (key that is not read, key of ours that it resembles)."""

    forms: Counter[str]
    misspelt: Counter[tuple[str, str]]


def survey(path: Path) -> Survey:
    """Reads the file once more; lines that are no rows are passed over. DataError for what is no file of rows."""
    forms: Counter[str] = Counter()
    misspelt: Counter[tuple[str, str]] = Counter()
    for row in read_rows(path, what="problems", holds="question and answer", on_fault=lambda error: None):
        form = form_of(row.fields)
        forms[OURS_TOO.name if form is None else form.name] += 1
        for key in row.fields if form is None else ():
            close = difflib.get_close_matches(key, OPTIONAL, n=1, cutoff=0.75) if key not in OPTIONAL else []
            if close and close[0] not in row.fields:
                misspelt[key, close[0]] += 1
    return Survey(forms=forms, misspelt=misspelt)
