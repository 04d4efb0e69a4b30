"""The tokenised store: content, counts, when it is made again, and that a torn one is never taken."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.example_cache import build_cache
from megatron_r1.data.examples import FileCounts, open_cache, training_sequences
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import DataError


@pytest.fixture
def tokenizer(tmp_path):
    return character_tokenizer(tmp_path / "tokenizer")


def write(path, *pairs):
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(tmp_path, files, tokenizer, **changes):
    """The folder of `files`' examples, in tmp_path / "cache"."""
    arguments = {"encoder": answer_encoder("plain", tokenizer), "max_tokens": 8} | changes
    return build_cache(files, cache_dir=tmp_path / "cache", **arguments)


def test_examples_of_all_files_and_their_counts(tmp_path, tokenizer):
    files = [
        write(tmp_path / "a.jsonl", ("1+1?", "2"), ("1+1?", "22"), ("1+1?", "222"), ("x", "<eos>")),
        write(tmp_path / "b.jsonl", ("2", "3"), (" 1+1?", "4")),
    ]
    store = open_cache(build(tmp_path, files, tokenizer))
    # "1+1?\n222" and the end are 9 tokens
    assert store.counts == (
        FileCounts(kept=2, too_long=1, control_text=1),
        FileCounts(kept=2, too_long=0, control_text=0),
    )
    assert len(store) == 4
    assert np.diff(store.starts).tolist() == [7, 8, 4, 8]
    assert store.files.tolist() == [0, 0, 1, 1]
    same, also, other, spaced = store.questions.tolist()
    assert same == also == spaced != other
    flat, lengths = store.gather([2, 0])
    assert lengths.tolist() == [4, 7]
    two, newline, three, end = (*tokenizer.encode("2\n3").tolist(), tokenizer.eos_id)
    assert flat[:4].tolist() == [two, newline, ~three, ~end]
    first, second = training_sequences((flat, lengths), "token_mean")
    assert first.token_ids.tolist() == [two, newline, three, end]
    assert first.loss_mask.tolist() == [False, False, True, True]
    assert tokenizer.decode(second.token_ids) == "1+1?\n2"
    assert (first.token_ids.dtype, first.token_weight.dtype) == (np.int32, np.float32)


def test_weights_by_token_and_by_sequence(tmp_path, tokenizer):
    store = open_cache(build(tmp_path, [write(tmp_path / "a.jsonl", ("q", "a"), ("q", "abc"))], tokenizer))
    batch = store.gather([0, 1])  # 2 and 4 trained tokens, after prompts of 2
    by_token = [s.token_weight.tolist() for s in training_sequences(batch, "token_mean")]
    assert by_token == [pytest.approx([0, 0] + [1 / 6] * 2), pytest.approx([0, 0] + [1 / 6] * 4)]
    by_sequence = [s.token_weight.tolist() for s in training_sequences(batch, "sequence_mean")]
    assert by_sequence == [pytest.approx([0, 0] + [1 / 4] * 2), pytest.approx([0, 0] + [1 / 8] * 4)]


def test_the_cache_is_taken_again_until_something_changes(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ("q", "a"))
    folder = build(tmp_path, [file], tokenizer)
    written = (folder / "tokens.bin").stat().st_mtime_ns
    copy = write(tmp_path / "same.jsonl", ("q", "a"))
    assert build(tmp_path, [copy], tokenizer) == folder
    assert (folder / "tokens.bin").stat().st_mtime_ns == written
    others = [
        build(tmp_path, [file], tokenizer, max_tokens=9),
        build(tmp_path, [file], tokenizer, encoder=answer_encoder("r1_zero", tokenizer), max_tokens=999),
        build(tmp_path, [write(tmp_path / "b.jsonl", ("q", "b"))], tokenizer),
    ]
    rules = tokenizer.folder / "tokenizer.json"
    rules.write_text(rules.read_text() + "\n")
    others.append(build(tmp_path, [file], tokenizer))
    assert len({folder, *others}) == 5


def test_the_chat_template_is_part_of_the_key(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ("q", "a"))
    folders = set()
    for end in ("", "{# another branch #}"):
        tokenizer.inner.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}" + end
        folders.add(build(tmp_path, [file], tokenizer, encoder=answer_encoder("chat", tokenizer), max_tokens=999))
    assert len(folders) == 2


@pytest.mark.parametrize("name", ["tokens.bin", "index.npz", "counts.json"])
@pytest.mark.parametrize("harm", ["absent", "cut", "empty"])
def test_a_torn_cache_is_refused_and_made_again(tmp_path, tokenizer, name, harm):
    file = write(tmp_path / "a.jsonl", ("q", "a"))
    folder = build(tmp_path, [file], tokenizer)
    whole = (folder / name).read_bytes()
    if harm == "absent":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[:-4] if harm == "cut" else b"")
    with pytest.raises(DataError, match="not a whole cache of examples"):
        open_cache(folder)
    assert build(tmp_path, [file], tokenizer) == folder
    assert len(open_cache(folder)) == 1


def test_what_a_killed_writer_left_is_not_taken(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ("q", "a"))
    folder = build(tmp_path, [file], tokenizer)
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    (partial / "tokens.bin").write_bytes(b"1234")
    assert build(tmp_path, [file], tokenizer) == folder
    assert len(open_cache(folder)) == 1 and not partial.exists()


def test_of_two_writers_at_once_one_writes_and_the_other_takes_it(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", *(("q", str(number)) for number in range(600)))
    told = []
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(build, tmp_path, [file], tokenizer, on_progress=lambda done, total: told.append(done))
            for _ in range(2)
        ]
        first, second = (future.result() for future in futures)
    assert first == second and told == [500]


def test_a_malformed_line_leaves_nothing_behind(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ("q", "a"))
    file.write_text(file.read_text() + "oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
        build(tmp_path, [file], tokenizer)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_file_of_which_nothing_is_left_is_named(tmp_path, tokenizer):
    files = [write(tmp_path / "a.jsonl", ("q", "a")), write(tmp_path / "b.jsonl", ("q", "x" * 9), ("q", "<eos>"))]
    with pytest.raises(DataError, match=r"b\.jsonl: no example is left: 1 are longer than max_tokens 8, 1 have"):
        build(tmp_path, files, tokenizer)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache/[0-9a-f]{32}: cannot be written: "):
        build(tmp_path, [write(tmp_path / "a.jsonl", ("q", "a"))], tokenizer)


def test_progress_is_in_lines(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", *(("q", str(number)) for number in range(1200)))
    seen = []
    build(tmp_path, [file], tokenizer, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(500, 1200), (1000, 1200)]


def test_a_worker_process_opens_the_store_itself(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", *(("q", str(number)) for number in range(1000)))
    store = open_cache(build(tmp_path, [file], tokenizer))
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert pickle.loads(sent).gather([7])[0].tolist() == store.gather([7])[0].tolist()


def test_what_is_not_read_and_what_is_not_trained_on_is_counted(tmp_path, tokenizer):
    tokenizer.inner.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate("abcdef")]
    thought = [*talk[:1], {**talk[1], "reasoning": "t"}, *talk[2:]]
    path = tmp_path / "a.jsonl"
    rows = [{"messages": talk, "score": 1}, {"messages": thought, "score": 2, "tags": ["x"], "id": 7}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_cache(build(tmp_path, [path], tokenizer, encoder=answer_encoder("chat", tokenizer), max_tokens=999))
    (counts,) = store.counts
    assert counts.not_read == {"score": 2, "tags": 1}
    assert counts.untrained == 1, "of six answers the one whose thought the template drops"
