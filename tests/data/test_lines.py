"""What every reader of JSON lines takes, and what it refuses by name."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.data.conversations import read_conversations
from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.lines import MAX_LEVELS, parse_row, read_rows
from megatron_r1.data.preferences import read_pairs
from megatron_r1.errors import DataError

PROBLEM = b'{"question": "2 \xe2\x80\xa8 eggs?", "answer": "18"}'


def packed(content: bytes) -> bytes:
    """Gzip without the time, which would give the tests other names in every process."""
    return gzip.compress(content, mtime=0)


def rows(path: Path, content: bytes) -> list[dict]:
    path.write_bytes(content)
    return [row.fields for row in read_rows(path, what="rows", holds="x")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"x": 1}', [{"x": 1}]),
        (b'{"x": 1}\n{"x": 2}\n', [{"x": 1}, {"x": 2}]),
        (b'{"x": 1}\r\n{"x": 2}\r\n', [{"x": 1}, {"x": 2}]),
        (b'{"x": 1}\n\n', [{"x": 1}]),
        (b'{"x": 1}\n \r\n\t\n\n', [{"x": 1}]),
        (b'\xef\xbb\xbf{"x": 1}\n{"x": 2}', [{"x": 1}, {"x": 2}]),
        (b'{"x": 1}\n\xef\xbb\xbf{"x": 2}', [{"x": 1}, {"x": 2}]),  # two such files, one after the other
        (b'[{"x": 1},\n {"x": 2}]\n', [{"x": 1}, {"x": 2}]),
        (b'\xef\xbb\xbf[\n{"x": 1}\n]', [{"x": 1}]),
        (b'{"x": "\\ud83d\\ude00 \xe2\x80\xa9"}', [{"x": "\U0001f600 \u2029"}]),
        (b'{"x": 1e308, "y": 0e-999, "z": -0.0}', [{"x": 1e308, "y": 0.0, "z": 0.0}]),
        (b'{"x": ' + b"7" * 4300 + b"}", [{"x": int("7" * 4300)}]),
        (b'{"x": ' + b"[" * 99 + b"]" * 99 + b"}", [{"x": json.loads("[" * 99 + "]" * 99)}]),
        (b'{"x": [' + b"[],[]," * 500 + b"[]]}", [{"x": [[]] * 1001}]),
        (b'{"x": "' + b"[" * 3000 + b'"}', [{"x": "[" * 3000}]),
        (packed(b'\xef\xbb\xbf{"x": 1}\n{"x": 2}\n\n'), [{"x": 1}, {"x": 2}]),
        (packed(b'[{"x": 1}]'), [{"x": 1}]),
    ],
)
def test_rows_are_read(tmp_path, content, found):
    assert rows(tmp_path / "f.jsonl", content) == found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"x": NaN}', "NaN is no JSON and no number"),
        (b'{"x": [Infinity]}', "Infinity is no JSON"),
        (b'{"x": {"y": -Infinity}}', "-Infinity is no JSON"),
        (b'{"x": 1e400}', "1e400 is beyond the largest double"),
        (b'{"x": -2.5E+309}', "-2.5E+309 is beyond"),
        (b'{"x": 1e-400}', "1e-400 is below the smallest double"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "an integer of 5001 digits"),
        (b'{"x": 1, "x": 1}', "the key 'x' stands twice"),
        (b'{"y": {"x": 1, "x": 2}}', "the key 'x' stands twice"),
        (b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b"}", f"more than {MAX_LEVELS} levels"),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", f"more than {MAX_LEVELS} levels"),
        (b'{"x": ' * 200_000, f"more than {MAX_LEVELS} levels"),
        (b'{"x": {"y": ["a", "\\ud800b"]}}', r"x.y[1] has an unpaired surrogate"),
        (b'{"\\udfff": 1}', "a key of the object has an unpaired surrogate"),
        (b'{"x": "\xed\xa0\x80"}', "not UTF-8 text"),
        (b'{"x": "\xe9"}', "not UTF-8 text (invalid continuation byte at byte 7)"),
        (b'{"x": "a\0"}', "NUL bytes"),
        (b'{"x": "a\tb"}', "not valid JSON"),
        (b"{'x': 1}", "not valid JSON"),
        (b'{"x": 1,}', "not valid JSON"),
        (b'{"x": 1} {"x": 2}', "not valid JSON: Extra data"),
        (b"{", "an object must stand on one line"),
        (b'"text"', "a JSON str; expected an object with x"),
        (b"null", "a JSON NoneType"),
        (b'\n{"x": 1}', "empty line"),
    ],
)
def test_a_line_is_refused_with_its_place_and_reason(tmp_path, line, words):
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "f.jsonl", b'{"x": 1}\n' + line + b"\n")
    assert str(caught.value).startswith(f"{tmp_path / 'f.jsonl'}, line 2: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"x": 1}'.encode("utf-16"), "UTF-16 text; write it as UTF-8: iconv"),
        (b"\xfe\xff" + '{"x": 1}'.encode("utf-16-be"), "UTF-16 text"),
        ('{"x": 1}'.encode("utf-16-le"), "UTF-16 text without a mark"),
        ('{"x": 1}'.encode("utf-16-be"), "UTF-16 text without a mark"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"PK\x03\x04", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (packed(b'{"x": 1}\n' * 5000)[:-20], "not a whole gzip file"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (b"", "the file has no rows"),
        (b"\n\n", "the file has no rows"),
        (b"\xef\xbb\xbf", "the file has no rows"),
        (b"[]", "the file has no rows"),
        (b'[{"x": 1}, 2]', "item 2: a JSON int"),
        (b'[{"x": 1}, {"x": NaN}]', "NaN is no JSON"),
        (b'[{"x": 1}\n', "not valid JSON"),
    ],
)
def test_a_file_is_refused_with_its_reason(tmp_path, content, words):
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "f.jsonl", content)
    assert str(caught.value).startswith(str(tmp_path / "f.jsonl")) and words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'x,y\n1,"a, ""b""\n2"\n', [{"x": "1", "y": 'a, "b"\n2'}]),
        (b"\xef\xbb\xbfx,y\r\n1,2\r\n3,\r\n\r\n", [{"x": "1", "y": "2"}, {"x": "3", "y": ""}]),
        (b"x,y\n1\n", "line 2: 1 cells; the first line names 2 columns"),
        (b"x,x\n1,2\n", "line 1: a column stands twice"),
        (b'x\n"a\n', "line 2: not valid CSV"),
        (b"x\n\xff\n", "line 2: not UTF-8"),
        (b"x,y\n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_tables(tmp_path, content, found):
    for name, packed in (("f.csv", content), ("f.csv.gz", gzip.compress(content))):
        if isinstance(found, list):
            assert rows(tmp_path / name, packed) == found
        else:
            with pytest.raises(DataError, match=found):
                rows(tmp_path / name, packed)


def test_a_folder_and_an_absent_file_are_refused(tmp_path):
    for path, words in ((tmp_path, "cannot be read: Is a directory"), (tmp_path / "no", "cannot be read: No such")):
        with pytest.raises(DataError, match=words):
            next(read_rows(path, what="rows", holds="x"))


def test_rows_before_a_fault_are_streamed(tmp_path):
    (tmp_path / "f").write_bytes(b'{"x": 1}\n{"x": 2}\n{')
    stream = read_rows(tmp_path / "f", what="rows", holds="x")
    assert [(next(stream).where, next(stream).number)] == [(f"{tmp_path / 'f'}, line 1", 2)]
    with pytest.raises(DataError, match="line 3"):
        next(stream)


def test_one_line_alone():
    assert parse_row(b'{"x": 1}', "here", "x") == {"x": 1}
    with pytest.raises(DataError, match=r"^here: a JSON list; expected an object with x"):
        parse_row(b"[1]", "here", "x")


READERS = [
    (lambda path: read_problems([path]), PROBLEM),
    (
        lambda path: list(read_conversations(path)),
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ),
    (
        lambda path: read_pairs([path]),
        b'{"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}',
    ),
]


@pytest.mark.parametrize(("read", "line"), READERS)
def test_every_reader_takes_and_refuses_the_same(tmp_path, read, line):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\n\n")
    assert len(read(path)) == 2
    for bad in (b'{"x": NaN}', b'{"x": 1e400}', b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b"}", b"\n" + line):
        path.write_bytes(line + b"\n" + bad)
        with pytest.raises(DataError, match=r"f\.jsonl, line 2: "):
            read(path)
