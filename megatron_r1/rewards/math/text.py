r"""Answers in one spelling: Unicode as LaTeX or ASCII, LaTeX without its spacing, sizes and styles.

Nothing here changes what a text says: case, primes, subscripts and words stay. Left out: units and sentences
(words.py) and what the symbols mean (reader.py).
"""

from __future__ import annotations

import re
import unicodedata

from megatron_r1.rewards.math.tokens import FUNCTIONS

WIDTHLESS = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe0e\ufe0f\ufeff]")
SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000\t\r\n]+")
MINUS_SIGNS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
RAISED = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
LOWERED = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
VULGAR = re.compile("[¼-¾⅐-⅞↉]")
ROOT = re.compile(r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z]|(?=[({\\]))")

CHARACTERS = str.maketrans(
    {
        "。": ".", "，": ",", "、": ",", "；": ";", "：": ":", "“": '"', "”": '"', "‘": "'", "’": "'", "′": "'",
        "″": "''", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ",
        "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
        "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "π": r"\pi ", "∠": r"\angle ", "△": r"\triangle ",
        "→": r"\to ", "⇒": r"\Rightarrow ", "ℝ": r"\R ", "ℤ": r"\Z ", "ℕ": r"\N ", "ℚ": r"\Q ", "ℂ": r"\C ",
        "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
        "∣": "|", "∗": "*", "∶": ":", "⁄": "/", "∕": "/", "…": r"\ldots ", "⋯": r"\ldots ", "％": "%", "￥": "¥",
        "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "ζ": r"\zeta ",
        "η": r"\eta ", "θ": r"\theta ", "κ": r"\kappa ", "λ": r"\lambda ", "μ": r"\mu ", "ν": r"\nu ", "ξ": r"\xi ",
        "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ϕ": r"\phi ", "χ": r"\chi ", "ψ": r"\psi ",
        "ω": r"\omega ", "Γ": r"\Gamma ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Ξ": r"\Xi ",
        "Π": r"\Pi ", "Σ": r"\Sigma ", "Φ": r"\Phi ", "Ψ": r"\Psi ", "Ω": r"\Omega ",
    }
)  # fmt: skip

SAME_COMMAND = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le", "leqq": "le", "geq": "ge", "geqslant": "ge", "geqq": "ge", "neq": "ne", "lor": "or", "vee": "or",
    "land": "and", "wedge": "and", "lbrace": "{", "rbrace": "}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "varnothing": "emptyset", "rightarrow": "to", "implies": "Rightarrow", "degree": "^{\\circ}", "lt": "<", "gt": ">",
    "ast": "*", "colon": ":", "cdots": "ldots", "dots": "ldots", "varphi": "phi", "varepsilon": "epsilon",
    "vartheta": "theta", "overrightarrow": "vec", "bar": "overline", "lbrack": "[", "rbrack": "]", "tg": "tan",
    "prime": "'", "backslash": "setminus", "dotsc": "ldots", "arctg": "arctan", "fbox": "boxed", "widehat": "hat",
}  # fmt: skip
"""Commands of one meaning. A value that is no word stands for itself, without a backslash (braces keep theirs)."""

NO_MEANING = re.compile(
    r"\\(?:left|right)\s*\.(?![0-9])|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])"
    r"|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|sf|tt|cal|mathstrut|strut|hfill|nonumber|"
    r"notag|large|Large|LARGE|huge|Huge|small|footnotesize|smallskip|par|noindent)(?![A-Za-z])"
    r"|\\(?:hspace|vspace|phantom|hphantom|vphantom|tag|label|color|textcolor)\*?\s*\{[^{}]*\}"
)
SPACING = re.compile(r"\\(?:quad|qquad|enspace|thinspace|space)(?![A-Za-z])|(?<!\\)\\[,;:!> ]|~|&nbsp;")
THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\}|,\\!|,\\,)\s*(?=[0-9]{3}(?![0-9]))")
ROW_GAP = re.compile(r"\\\\\s*\[[0-9. ]*[a-z]{2}\]|\\cr(?![A-Za-z])")
DELIMITERS = re.compile(r"\$+|(?<!\\)\\[()\[\]]|`+")
MONEY = re.compile(
    r"\\\$|[€£¥₹₩₽฿]|(?<![A-Za-z])(?:USD|EUR|GBP|US|RMB|CNY)\s*(?=[\d$\\])|(?<=[\d}])\s*(?:USD|EUR|GBP|RMB|CNY)\b"
)
UNION = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[\\])")
BOLD = re.compile(r"(?<![0-9A-Za-z)}\]])\*\*(?=\S)|(?<=\S)\*\*(?![0-9A-Za-z({\\-])|(?<![\w\\])__(?=\w)|(?<=\w)__(?!\w)")
STYLED = re.compile(
    r"\\(?:text|textrm|textbf|textit|textnormal|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|boldsymbol|"
    r"bm|operatorname\*?|mathcal|mathscr|mathfrak|emph|underline|textup|rm)\s*\{([^{}]*)\}"
)
NUMBER_SETS = re.compile(r"\\math(?:bb|bf|rm)\s*\{([RZNQC])\}|\\mathbb\s+([RZNQC])(?![A-Za-z])")
PERCENT = re.compile(r"\s*(?:\\?%|\bper\s?cent\b|\bpercent\b|\bpct\b)", re.IGNORECASE)
FONT_OF_LETTER = re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|mathcal|bm|boldsymbol)\s+([A-Za-z])(?![A-Za-z])")
COMMAND = re.compile(r"\\([A-Za-z]+)")
TEXT = re.compile(r"\\text\{([^{}]*)\}")


def normalise(text: str) -> str:
    r"""The text in one spelling. \text{...} is what is left of the font commands around two or more letters (around one
    letter the letter); `$`, \( and the like are gone, and so are money signs."""
    text = SPACES.sub(" ", WIDTHLESS.sub("", text))
    text = MINUS_SIGNS.sub("-", text)
    text = RAISED.sub(lambda run: "^{" + "".join(SUPERSCRIPTS[mark] for mark in run[0]) + "}", text)
    text = LOWERED.sub(lambda run: "_{" + "".join(SUBSCRIPTS[mark] for mark in run[0]) + "}", text)
    text = VULGAR.sub(_fraction, text)
    text = ROOT.sub(lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    if not text.isascii():
        text = "".join(chr(ord(mark) - 0xFEE0) if "！" <= mark <= "～" else mark for mark in text)
        text = text.translate(CHARACTERS)
    text = BOLD.sub(" ", text)
    text = re.sub(r"(?<![\w)\]}*\\])\*(?=[^\s*])([^*]+)(?<=[^\s*])\*(?![\w(*])", r" \1 ", text)  # *18*
    text = re.sub(r"^[#>=\s]+|\\therefore(?![A-Za-z])", "", text)
    if text.replace(" ", "").isalnum() and not PERCENT.search(text) and not MONEY.search(text):
        return " ".join(text.split())
    text = ROW_GAP.sub(r"\\\\ ", text)
    text = SPACING.sub(" ", NO_MEANING.sub(" ", THOUSANDS.sub(",", text)))
    text = UNION.sub(r" \\cup ", DELIMITERS.sub(" ", MONEY.sub(" ", text)))
    text = NUMBER_SETS.sub(lambda found: f"\\{found[1] or found[2]} ", text)
    text = FONT_OF_LETTER.sub(lambda found: f" {found[1]} ", text)
    before = None
    while before != text:  # fonts nest
        before, text = text, STYLED.sub(_plain_font, text)
    text = PERCENT.sub("%", COMMAND.sub(_one_command, text.replace("\0", "\\text")))
    return _without_full_stop(" ".join(text.split()))


def _fraction(found: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _plain_font(found: re.Match[str]) -> str:
    r"""One letter or a formula in a font is itself. Words stay marked: a NUL stands for \text until all fonts are
    done."""
    inside = found[1].replace("\0", "")
    if inside.strip() in FUNCTIONS:
        return f"\\{inside.strip()} "
    if re.search(r"[^\W\d_]{2}", inside) or re.search(r"[^\x00-\x7f]", inside):
        return f"\0{{{' '.join(inside.split())}}}"
    letter = inside.strip()
    if re.fullmatch("[A-Za-z]", letter) and found[0].startswith((r"\text", r"\mbox", r"\hbox", r"\mathrm")):
        # `42\text{ m}` and `42\mathrm{~m}` are a unit, `1-\frac1{\mathrm{e}}` is not.
        return f" {letter} " if letter in "eid" and inside == letter else f"\0{{{letter}}}"
    return f" {inside} " if inside.strip() else " "


def _one_command(found: re.Match[str]) -> str:
    name = SAME_COMMAND.get(found[1])
    if name is None:
        return found[0]
    return f"\\{name}" if name.isalpha() or name in "{}" else name


def _without_full_stop(text: str) -> str:
    """Without one full stop (or another mark that ends a sentence) at the end."""
    if len(text) > 2 and text[0] in '"“' and text[-1] in '"”':
        text = text[1:-1]
    shorter = re.sub(r"(?<![.!])[.]$|(?<=[0-9A-Za-z}\])])[;,]$", "", text.strip()).strip()
    return shorter or text
