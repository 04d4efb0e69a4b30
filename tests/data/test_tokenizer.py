"""The character tokenizer, loading from a folder, and the three templates."""

import json

import numpy as np
import pytest

from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.preferences import JudgedEncoder
from megatron_r1.data.template import PromptRoom, encode_prompt, render_prompt
from megatron_r1.data.tokenizer import TAGS, character_tokenizer, load_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Problem


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return character_tokenizer(tmp_path_factory.mktemp("characters"))


def problem(text="1 + 2?", *, roles=("user",)):
    return Problem(id="p1", domain="math", messages=tuple({"role": r, "content": text} for r in roles))


def test_text_survives_and_tags_are_single_tokens(tokenizer):
    text = "<think>7+8=15 c1\n 4+2+1=7</think> <answer>75</answer>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) == len(text) - sum(len(tag) - 1 for tag in TAGS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 3 + 4 + 94 + 2


def test_decode_drops_the_end_but_shows_special_tokens_inside(tokenizer):
    one = int(tokenizer.encode("1")[0])
    end, pad = tokenizer.eos_id, tokenizer.pad_id
    assert tokenizer.decode([one, end, pad, pad]) == "1"
    assert tokenizer.decode([one, end, one]) == "1<eos>1"


def test_engines_that_hide_special_tokens_still_show_the_tags(tokenizer):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer.folder)
    text = "<think>a b</think><answer>5</answer>"
    ids = other.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text).tolist()
    assert other.decode([*ids, tokenizer.eos_id], skip_special_tokens=True) == text


def test_class_named_by_the_folder_does_not_change_the_rules(tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tokenizer.folder / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    loaded = load_tokenizer(tmp_path)
    text = "two  spaces"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_ids == (1, 7)
    assert loaded.encode("a", start=True).tolist() == [2, *loaded.encode("a").tolist()]


def test_missing_or_broken_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


def test_r1_zero_template_is_the_papers(tokenizer):
    assert render_prompt(problem("What is {prompt} 2"), "r1_zero", tokenizer) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. The reasoning process and answer are enclosed within <think>...</think> and "
        "<answer>...</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> "
        "answer here </answer>. User: What is {prompt} 2. Assistant:"
    )


def test_plain_template_is_the_question_and_a_newline(tokenizer):
    ids = encode_prompt(problem(), template="plain", tokenizer=tokenizer, max_new_tokens=3, max_model_len=10)
    assert tokenizer.decode(ids) == "1 + 2?\n"
    assert len(ids) == 7


def test_prompt_without_room_for_an_answer_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"problem p1: a prompt of 7 tokens and an answer of 4 .* max_model_len 10"):
        encode_prompt(problem(), template="plain", tokenizer=tokenizer, max_new_tokens=4, max_model_len=10)


def test_flat_templates_refuse_other_turns(tokenizer):
    with pytest.raises(DataError, match="one user turn"):
        render_prompt(problem(roles=("system", "user")), "plain", tokenizer)


def test_chat_template_asks_for_tags_and_leaves_think_to_the_model(tokenizer):
    with pytest.raises(ConfigError, match="needs a chat template"):
        render_prompt(problem(), "chat", tokenizer)
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.inner.chat_template = turns + "<think>\n"
    try:
        text = render_prompt(problem("hi", roles=("system", "user")), "chat", tokenizer)
        assert text.startswith("[system]hi\n\nThink about") and "<answer> and </answer>" in text
        assert text.endswith("[user]hi[assistant]")
        assert render_prompt(problem("hi"), "chat", tokenizer).startswith("[system]Think about")
    finally:
        tokenizer.inner.chat_template = None


@pytest.fixture
def small_model(tmp_path):
    """A tokenizer with one token more than its model has: "<tool>" is token 103."""
    character_tokenizer(tmp_path, phrases=("<tool>",))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 103}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.rows == 103 and loaded.vocab_size == 104 and not loaded.every_token_has_a_row
    return loaded


def test_a_token_without_a_row_is_refused_where_text_becomes_tokens(small_model):
    """SFT and distillation, preference pairs, and the problems of GRPO when they are read, though they are short."""
    says = "writes token 103, '<tool>', but the model's embedding has 103 rows"
    good, bad = ({"role": "user", "content": text} for text in ("1 + 2?", "<tool> 2?"))
    encoder = answer_encoder("plain", small_model)
    judged = JudgedEncoder(template="plain", tokenizer=small_model, part="response")
    room = PromptRoom(template="plain", tokenizer=small_model, max_new_tokens=4, max_model_len=512)
    answer = {"role": "assistant", "content": "3"}
    assert len(encoder.encode((good, answer), where="a")[0]) and len(judged.encode((good,), "3", where="a"))
    assert room(problem("1 + 2?"))
    for call in (
        lambda: encoder.encode((bad, answer), where="a"),
        lambda: encoder.encode((good, answer | {"content": "<tool>"}), where="a"),
        lambda: judged.encode((good,), "<tool>", where="a"),
        lambda: room(problem("<tool>")),
        lambda: encode_prompt(
            problem("<tool>"), template="plain", tokenizer=small_model, max_new_tokens=3, max_model_len=9
        ),
    ):
        with pytest.raises(DataError, match=says):
            call()


def test_an_end_token_without_a_row_is_refused_and_padding_without_one_is_not_used(small_model):
    settings = json.loads((small_model.folder / "tokenizer_config.json").read_text())
    (small_model.folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<tool>"}))
    loaded = load_tokenizer(small_model.folder)
    assert (loaded.inner.pad_token_id, loaded.pad_id) == (103, loaded.eos_id)
    (small_model.folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<tool>"}))
    with pytest.raises(DataError, match=r"token 103, '<tool>', but the model's embedding has 103 rows"):
        load_tokenizer(small_model.folder)
