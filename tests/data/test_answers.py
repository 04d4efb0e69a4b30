"""Token ids and loss masks of conversations, by hand: the character tokenizer makes a token of each character."""

import json

import numpy as np
import pytest

from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.template import R1_ZERO, TAGS_INSTRUCTION, encode_prompt, render_prompt
from megatron_r1.data.tokenizer import Thinking, character_tokenizer, load_tokenizer
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


CHATML = "{% for m in messages %}<unk>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<unk>assistant\n{% endif %}"
HYBRID = (  # DeepSeek V3.1's way: no thought unless it is asked for, and none kept
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
KNOWS = (  # Qwen3's way: the thought of the last answer stands between newlines
    "{% for m in messages %}[{{ m.role }}]"
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SHORTENED = TURNS.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
R1 = SHORTENED + "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"


def with_template(tokenizer, template, thinking: Thinking = "on"):
    tokenizer.inner.chat_template = template
    tokenizer.inner.save_pretrained(tokenizer.folder)
    return load_tokenizer(tokenizer.folder, thinking=thinking)


def thinking_chat():
    turns = chat("a", "b", "c", "<answer>d</answer>")
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "t", "\nu\n"
    return turns


@pytest.mark.parametrize(
    ("template", "trained", "context"),
    [
        (
            TURNS + GENERATION,
            ["<think>t</think>b<eos>", "<think>u</think><answer>d</answer><eos>"],
            "<think>t</think>b",
        ),
        (HYBRID, ["<think>u</think><answer>d</answer><eos>"], "[assistant]</think>b<eos>"),
        (KNOWS, ["<think>\nu\n</think>\n\n<answer>d</answer><eos>"], "[assistant]b<eos>"),
        (R1, ["<think>\nu\n</think>\n\n<answer>d</answer><eos>"], "[assistant]b<eos>"),
    ],
)
def test_a_thought_that_is_given_apart_has_the_templates_form(tokenizer, template, trained, context):
    loaded = with_template(tokenizer, template)
    ids, mask = answer_encoder("chat", loaded).encode(thinking_chat(), where="x")
    assert parts(loaded, ids, mask)[1::2] == trained
    text = loaded.inner.decode(ids)
    assert context in text and TAGS_INSTRUCTION in text


def test_flat_templates_have_the_papers_tags(tokenizer):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "t"}]
    for template in ("plain", "r1_zero"):
        ids, mask = answer_encoder(template, tokenizer).encode(turns, where="x")
        assert parts(tokenizer, ids, mask)[1] == "<think>t</think>2<eos>"


def test_the_end_of_a_turn_is_the_templates_though_the_folder_names_another(tokenizer):
    """Qwen2.5's base model: <|im_end|> ends turns, <|endoftext|> is its only end-of-sequence token."""
    loaded = with_template(tokenizer, CHATML + OPENED)
    encoder = answer_encoder("chat", loaded)
    pad = loaded.inner.pad_token_id
    assert (loaded.eos_id, encoder.end_id) == (1, pad) and loaded.eos_ids == (1, pad), "the engine stops at both"
    ids, mask = encoder.encode(chat("a", "b", "c", "d"), where="x")
    assert parts(loaded, ids, mask)[1::2] == ["b<pad>", "d<pad>"], "earlier answers are trained on"


def test_a_template_that_closes_the_thought_is_asked_to_think_or_refused(tokenizer):
    assert render(with_template(tokenizer, HYBRID)).endswith("[assistant]")
    assert render(with_template(tokenizer, HYBRID, "off")).endswith("[assistant]</think>")
    assert render(with_template(tokenizer, KNOWS, "off")).endswith("[assistant]<think>\n\n</think>\n\n")
    assert render(with_template(tokenizer, KNOWS, "template")).endswith("[assistant]")
    with pytest.raises(
        ConfigError, match=r"data\.thinking is 'template', and the chat template of .* closes the thought"
    ):
        answer_encoder("chat", with_template(tokenizer, HYBRID, "template")).encode(chat("a", "b"), where="x")
    always = TURNS + "{% if add_generation_prompt %}[assistant]</think>{% endif %}"
    with pytest.raises(ConfigError, match=r"data\.thinking is 'on'"):
        render(with_template(tokenizer, always))


def render(tokenizer):
    return render_prompt(Problem(id="p", domain="", messages=tuple(chat("a"))), "chat", tokenizer)


def test_no_thought_is_trained_on_where_there_is_none(tokenizer):
    encoder = answer_encoder("chat", with_template(tokenizer, HYBRID, "off"))
    ids, mask = encoder.encode(chat("a", "b"), where="x")
    assert parts(tokenizer, ids, mask) == ["[user]a<eos>[assistant]</think>", "b<eos>"]
    for turns in (thinking_chat(), chat("a", "<think>t</think>b")):
        with pytest.raises(DataError, match=r"a\.jsonl, line 3: an answer has a thought, and data\.thinking is off"):
            encoder.encode(turns, where="a.jsonl, line 3")


def test_the_text_of_a_special_token_is_seen_in_a_thought_too(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "<eos>"}]
    assert answer_encoder("plain", tokenizer).has_control_text(turns)
