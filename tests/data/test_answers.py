"""Token ids and loss masks of conversations, by hand: the character tokenizer makes a token of each character."""

import json

import numpy as np
import pytest

from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.template import R1_ZERO, TAGS_INSTRUCTION, encode_prompt
from megatron_r1.data.tokenizer import character_tokenizer, load_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Problem

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def tokenizer(tmp_path):
    return character_tokenizer(tmp_path)


def chat(*contents, system=None):
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def parts(tokenizer, ids, mask):
    """The text, split where the mask changes: what is trained on stands in the odd places."""
    edges = np.flatnonzero(np.diff(mask)) + 1
    return [tokenizer.inner.decode(part) for part in np.split(ids, edges)]


def test_plain_trains_on_the_answer_and_its_end(tokenizer):
    ids, mask = answer_encoder("plain", tokenizer).encode(chat("1+1?", "2"), where="x")
    one, plus, question, newline, two = (int(tokenizer.encode(text)[0]) for text in "1+?\n2")
    assert ids.tolist() == [one, plus, one, question, newline, two, tokenizer.eos_id]
    assert mask.tolist() == [False] * 5 + [True] * 2
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_r1_zero_is_the_papers_prompt_and_then_the_answer(tokenizer):
    ids, mask = answer_encoder("r1_zero", tokenizer).encode(chat("1+1?", " <think>t</think>"), where="x")
    prompt = R1_ZERO.replace("{prompt}", "1+1?")
    assert parts(tokenizer, ids, mask) == [prompt, " <think>t</think><eos>"]
    assert mask.sum() == 1 + 1 + 1 + 1 + 1  # space, two tags, t, the end


def test_flat_templates_name_the_line_of_other_turns(tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: its turns are .* use template 'chat'"):
        answer_encoder("plain", tokenizer).encode(chat("a", "b", "c", "d"), where="a.jsonl, line 3")


def test_chat_needs_a_chat_template(tokenizer):
    with pytest.raises(ConfigError, match="needs a chat template"):
        answer_encoder("chat", tokenizer)


def test_chat_prompt_is_the_one_that_rl_sends(tokenizer):
    tokenizer.inner.chat_template = TURNS + GENERATION + "{% if add_generation_prompt %}<think>\n{% endif %}"
    turns = chat("hi", "<think>t</think>yes", system="Be kind.")
    ids, mask = answer_encoder("chat", tokenizer).encode(turns, where="x")
    assert parts(tokenizer, ids, mask) == [
        f"[system]Be kind.\n\n{TAGS_INSTRUCTION}<eos>[user]hi<eos>[assistant]",
        "<think>t</think>yes<eos>",
    ]
    problem = Problem(id="p", domain="", messages=tuple(turns[:-1]))
    prompt = encode_prompt(problem, template="chat", tokenizer=tokenizer, max_new_tokens=1, max_model_len=9999)
    assert ids[~mask].tolist() == prompt.tolist()


def test_earlier_answers_that_the_template_keeps_are_trained_on_too(tokenizer):
    tokenizer.inner.chat_template = TURNS + GENERATION
    ids, mask = answer_encoder("chat", tokenizer).encode(chat("a", "b", "c", "<think>t</think>d"), where="x")
    system = f"[system]{TAGS_INSTRUCTION}<eos>"
    assert parts(tokenizer, ids, mask) == [
        f"{system}[user]a<eos>[assistant]",
        "b<eos>",
        "[user]c<eos>[assistant]",
        "<think>t</think>d<eos>",
    ]


def test_a_conversation_without_thoughts_is_not_told_of_tags(tokenizer):
    """The second SFT's 200k: writing and the like."""
    tokenizer.inner.chat_template = TURNS + GENERATION
    ids, mask = answer_encoder("chat", tokenizer).encode(chat("a", "b", system="Be kind."), where="x")
    assert parts(tokenizer, ids, mask) == ["[system]Be kind.<eos>[user]a<eos>[assistant]", "b<eos>"]


def test_earlier_answers_that_the_template_shortens_are_not(tokenizer):
    shortened = "(m.content if m.role == 'system' else m.content.split('</think>')[-1])"
    tokenizer.inner.chat_template = TURNS.replace("m.content", shortened) + GENERATION
    encoder = answer_encoder("chat", tokenizer)
    ids, mask = encoder.encode(chat("a", "<think>t</think>b", "c", "<think>u</think>d"), where="x")
    assert parts(tokenizer, ids, mask) == [
        f"[system]{TAGS_INSTRUCTION}<eos>[user]a<eos>[assistant]b<eos>[user]c<eos>[assistant]",
        "<think>u</think>d<eos>",
    ]
    ids, mask = encoder.encode(chat("a", "b", "c", "<think>u</think>d"), where="x")
    assert parts(tokenizer, ids, mask)[1::2] == ["b<eos>", "<think>u</think>d<eos>"]


def test_the_end_is_the_one_that_the_template_writes_and_the_engine_stops_at(tokenizer):
    """Llama 3's way: the tokenizer's end token ends texts, another one turns."""
    folder = tokenizer.folder
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 2]}))
    loaded = load_tokenizer(folder)
    unk = loaded.inner.unk_token_id
    assert (loaded.eos_ids, unk) == ((1, 2), 2)
    loaded.inner.chat_template = TURNS.replace("<eos>", "<unk>\n") + GENERATION
    encoder = answer_encoder("chat", loaded)
    ids, mask = encoder.encode(chat("a", "b", "c", "d"), where="x")
    # Not the newline after it: no engine samples past the end token.
    assert encoder.end_id == unk and parts(loaded, ids, mask)[1::2] == ["b<unk>", "d<unk>"]
    assert answer_encoder("plain", loaded).end_id == 1
    loaded.inner.chat_template = TURNS.replace("<eos>", "\n") + GENERATION
    assert answer_encoder("chat", loaded).end_id == 1


def test_the_text_of_a_special_token_is_seen_in_any_turn_but_tags_are_not(tokenizer):
    encoder = answer_encoder("plain", tokenizer)
    assert encoder.has_control_text(chat("say <eos> now", "no"))
    assert encoder.has_control_text(chat("hi", "the end <pad>"))
    assert not encoder.has_control_text(chat("what is <think>?", "<think>t</think><answer>e < o, s > a</answer>"))
