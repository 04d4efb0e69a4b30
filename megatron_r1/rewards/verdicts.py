"""How a judge's answer is read: its last verdict, or nothing. Pure functions.

A verdict that is quoted, asked about, hedged, or stands in the judge's own thought is none: nothing is better than a
guess, since who comes to nothing is asked again and counted (judge.py). Left out: what the judge is shown
(judge_text.py).
"""

from __future__ import annotations

import unicodedata

import regex

MARKUP = regex.compile(r"[*_`#~]+|\\(?:boxed|text|textbf|mathrm|mathbf)\s*(?=\{)|[{}]")
QUOTE_LINE = regex.compile(r"^[ \t]*>[^\n]*", regex.MULTILINE)
QUOTED = regex.compile(r"\"[^\"\n]*+\"|“[^”\n]*+”|«[^»\n]*+»|「[^」\n]*+」|‘[^’\n]*+’|(?<!\w)'[^'\n]*+'(?!\w)")

VERDICT = regex.compile(
    r"""
    \bverdict\b [\"”)]?+ \s*+
    (?: [:：=–—-]++>? \s*+ (?:is\s)? | is\b\s*+[:：]?+\s*+ | (?<negation>isn['’]t|is\s+not)\s++
      | (?<=\n\s*|^\W*verdict\s*))
    [\"“(\[<]?+ (?:that\s)?+ (?:it\s+is\s|the\s+(?:answer|response)\s+is\s)?+
    (?P<denial>not\s++)?+ (?P<value>correct|incorrect)\b
    """,
    regex.IGNORECASE | regex.VERBOSE | regex.MULTILINE,
)
ENDED = regex.compile(
    r"[\s\"”)\]>]*+(?:$|[.!;:\p{So}\p{Sm}–—-](?![\w/])|[(\[]|,?\s*(?:because|since|as|given)\b)", regex.IGNORECASE
)
"""What may follow a verdict: an end, or a reason. Not a question mark, an alternative or a reservation."""

ANOTHERS = regex.compile(
    r"(?:\b(?:not|never|cannot|doubt|unless|if|whether|claim(?:s|ed)?|says|said|states|stated|asserts|insists|wants)\b|n['’]t\b)"
    r"[^.!?;\n]*+$",
    regex.IGNORECASE,
)
"""Before a verdict in its sentence: it is denied, supposed, or somebody else's."""


def parse_verdict(text: str) -> bool | None:
    """The last verdict after the judge's own thought; None if there is none, or the last one is no clear one."""
    said = _said(text)
    found = [one for one in VERDICT.finditer(said) if not ANOTHERS.search(said, max(0, one.start() - 200), one.start())]
    if not found:
        return None
    last = found[-1]
    if ENDED.match(_rest(said, last.end())) is None:
        return None
    denied = bool(last["denial"]) + bool(last["negation"])
    value = last["value"].lower() == "correct"
    return value if not denied else False if denied == 1 and value else None


def _rest(text: str, place: int) -> str:
    """What follows in the line, as far as it matters."""
    return text[place : place + 200].partition("\n")[0]


def _said(text: str) -> str:
    """What the judge says itself after its thought, in plain characters: without markup and without what it quotes.
    Nothing where the thought does not end."""
    _, closed, after = text.rpartition("</think>")
    if "<think>" in after:
        return ""
    plain = MARKUP.sub("", unicodedata.normalize("NFKC", after if closed else text))
    plain = QUOTE_LINE.sub("", plain)
    return "\n".join(map(_without_quotations, plain.split("\n")))


def _without_quotations(line: str) -> str:
    """The line without quotations of a verdict or of numbers; but one that is the whole line is the judge's own, which
    was shown the line in quotation marks."""
    whole = QUOTED.fullmatch(line.strip().rstrip("."))
    if whole:
        return whole[0][1:-1]
    return QUOTED.sub(
        lambda found: "…" if regex.search(r"\bverdict\b.*correct|\d", found[0], regex.IGNORECASE) else found[0], line
    )
