"""How people write languages, and what is none."""

import pytest

from megatron_r1.config.languages import NAMES, language_code, language_fault


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("en", "en"), ("EN", "en"), ("English", "en"), (" english ", "en"), ("eng", "en"), ("en-US", "en"),
        ("en_GB.UTF-8", "en"), ("zh", "zh"), ("ZH", "zh"), ("zh-CN", "zh"), ("zh_TW", "zh"), ("zh_Hans", "zh"),
        ("zh-Hant-HK", "zh"), ("chinese", "zh"), ("Chinese (Simplified)", "zh"), ("Traditional Chinese", "zh"),
        ("中文", "zh"), ("简体中文", "zh"), ("cmn", "zh"), ("yue", "zh"), ("pt-BR", "pt"), ("es-419", "es"),
        ("sr-Latn", "sr"), ("de-CH-1996", "de"), ("iw", "he"), ("nb", "no"), ("fil", "tl"), ("Deutsch", "de"),
        ("日本語", "ja"), ("gsw", None), ("tlh", None), ("cn", None), ("jp", None), ("e", None), ("", None),
        ("english please", None), ("en,zh", None), ("en-", None), ("zxx", None), ("xx-US", None),
    ],
)  # fmt: skip
def test_a_language_is_told_or_not(text, code):
    assert language_code(text) == code
    assert (language_fault(text) is None) == (code is not None)


def test_no_word_names_two_languages():
    words = [word for code, names in NAMES.items() for word in (code, *names.split())]
    assert len(words) == len(set(words))
