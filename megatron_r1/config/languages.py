"""The languages that can be asked for, and how people write them: `zh-CN`, `EN`, `English` and `chinese` are codes too.

One function turns what stands in a configuration or in a data line into the code that the language reward
(rewards/language.py) knows, or says that there is none. On this floor because both configuration and data are checked
with it before anything heavy is imported. Left out: which language a text is in.
"""

from __future__ import annotations

import re

NAMES = {
    "af": "afr afrikaans", "am": "amh amharic", "an": "arg aragonese", "ar": "ara arabic العربية",
    "as": "asm assamese", "az": "aze azerbaijani", "ba": "bak bashkir", "be": "bel belarusian",
    "bg": "bul bulgarian български", "bn": "ben bengali bangla", "br": "bre breton", "bs": "bos bosnian",
    "ca": "cat catalan", "cs": "ces cze czech čeština", "cy": "cym wel welsh", "da": "dan danish dansk",
    "de": "deu ger german deutsch", "dz": "dzo dzongkha", "el": "ell gre grc greek ελληνικά",
    "en": "eng english", "eo": "epo esperanto", "es": "spa spanish español castellano", "et": "est estonian",
    "eu": "eus baq basque", "fa": "fas per persian farsi", "fi": "fin finnish suomi", "fo": "fao faroese",
    "fr": "fra fre french français", "fy": "fry frisian", "ga": "gle irish", "gd": "gla gaelic", "gl": "glg galician",
    "gu": "guj gujarati", "ha": "hau hausa", "he": "heb hbo iw hebrew עברית", "hi": "hin hindi हिन्दी",
    "hr": "hrv croatian", "ht": "hat haitian", "hu": "hun hungarian magyar", "hy": "hye arm armenian",
    "id": "ind indonesian", "ig": "ibo igbo", "is": "isl ice icelandic", "it": "ita italian italiano",
    "ja": "jpn japanese 日本語", "jv": "jav javanese", "ka": "kat geo georgian", "kk": "kaz kazakh",
    "km": "khm khmer", "kn": "kan kannada", "ko": "kor korean 한국어", "ku": "kur kurdish", "ky": "kir kyrgyz",
    "la": "lat latin", "lb": "ltz luxembourgish", "lg": "lug ganda", "ln": "lin lingala", "lo": "lao",
    "lt": "lit lithuanian", "lv": "lav latvian", "mg": "mlg malagasy", "mk": "mkd mac macedonian",
    "ml": "mal malayalam", "mn": "mon mongolian", "mr": "mar marathi", "ms": "msa may malay", "mt": "mlt maltese",
    "my": "mya bur burmese", "ne": "nep nepali", "nl": "nld dut dutch nederlands", "nn": "nno nynorsk",
    "no": "nor nob nb norwegian norsk bokmål", "oc": "oci occitan", "om": "orm oromo", "or": "ori odia oriya",
    "pa": "pan punjabi", "pl": "pol polish polski", "ps": "pus pashto", "pt": "por portuguese português",
    "qu": "que quechua", "ro": "ron rum romanian română", "ru": "rus russian русский", "rw": "kin kinyarwanda",
    "sa": "san sanskrit", "se": "sme", "si": "sin sinhala", "sk": "slk slo slovak", "sl": "slv slovenian slovene",
    "sn": "sna shona", "so": "som somali", "sq": "sqi alb albanian", "sr": "srp serbian srpski српски",
    "st": "sot sotho", "sv": "swe swedish svenska", "sw": "swa swahili", "ta": "tam tamil", "te": "tel telugu",
    "tg": "tgk tajik", "th": "tha thai ไทย", "tk": "tuk turkmen", "tl": "tgl fil tagalog filipino",
    "tr": "tur turkish türkçe", "tt": "tat tatar", "ug": "uig uyghur", "uk": "ukr ukrainian українська",
    "ur": "urd urdu", "uz": "uzb uzbek", "vi": "vie vietnamese", "vo": "vol volapük", "wa": "wln walloon",
    "xh": "xho xhosa", "yo": "yor yoruba", "zu": "zul zulu",
    # Han characters are counted as one language, whatever is spoken.
    "zh": "zho chi cmn yue wuu chinese mandarin cantonese 中文 汉语 漢語 普通话",
}  # fmt: skip
"""ISO 639-1 code: other codes and names of the same language (ISO 639-2 and 639-3, English, its own)."""

WITHOUT_NAMES = (
    "ace", "ary", "arz", "bcl", "crh", "ext", "fuv", "gcf", "gcr", "gom", "gug", "guw", "kab", "kik", "lij", "ltg",
    "nso", "pcm", "sdh", "uzs", "vec",
)  # fmt: skip
"""ISO 639-3 codes that the detector of the language reward knows and that have no shorter one."""

LANGUAGES = frozenset((*NAMES, *WITHOUT_NAMES))

TAG = re.compile(
    r"(?P<language>[^\W\d_]+)(?:-[a-z]{4})?(?:-(?:[a-z]{2}|\d{3}))?(?:-(?:[a-z\d]{5,8}|\d[a-z\d]{3}))*(?:-[a-z\d]-\S+)?"
)
"""BCP 47's language, script, region, variants and extensions, in lower case; the language may be a name."""

WRITTEN = re.compile(
    r"(?:(?:simplified|traditional)\s+|[简簡繁]体?體?)?(?P<name>.+?)(?:\s*\((?:simplified|traditional)\))?"
)
"""The two ways to write Chinese, before or after the name."""

CODE_OF = {word: code for code, names in NAMES.items() for word in (code, *names.split())} | {
    code: code for code in WITHOUT_NAMES
}


def language_code(text: str) -> str | None:
    """The code of the language that `text` names: a code of two or three letters with or without script and region
    (`en`, `ZH`, `zh-CN`, `zh_Hans`, `eng`), or a name (`English`, `chinese`, `中文`), case and white space aside. None
    for what names no language that can be told.

    >>> language_code("zh_Hans"), language_code(" English "), language_code("tlh")
    ('zh', 'en', None)
    """
    plain = " ".join(text.casefold().replace("_", "-").split())
    named = WRITTEN.fullmatch(plain)
    plain = named["name"] if named else plain
    tag = TAG.fullmatch(plain.removesuffix(".utf-8"))
    return CODE_OF.get(tag["language"]) if tag else None


def language_fault(text: str) -> str | None:
    """Why `text` cannot be asked for, as the end of a sentence that begins with the field; None if it can."""
    if language_code(text) is not None:
        return None
    return f"{text!r}; it is no language that can be told: use a code such as en or zh ({', '.join(sorted(NAMES))})"
