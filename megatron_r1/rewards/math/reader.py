r"""From an answer's text to a tree, or None: all of the text is read, or none of it.

Nothing is skipped, guessed or computed, so an answer can cost no more than its length and no part of it can get lost.
Text is what text.normalise returns. LaTeX and plain ASCII are read alike: `\frac12`, `1/2`, `sqrt(2)`, `2^{10}`,
`2^10`, `2**10`. Left out: sentences and units (words.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_r1.rewards.math.tokens import FUNCTIONS, SAME_FUNCTION, TokenStream, UnreadableError, number, split
from megatron_r1.rewards.math.tree import Apply, Items, Matrix, Node, Number, Relation, SetBuilder, Symbol

GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega pi ell hbar infty emptyset R Z N Q C imath jmath ldots "
    "partial nabla aleph top bot square".split()
)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "ge": ">=", "ne": "!=",
    "in": "in", "approx": "approx", "equiv": "equiv", "sim": "sim", "cong": "cong", "parallel": "parallel",
    "perp": "perp", "subset": "subset", "subseteq": "subseteq", "supset": "supset", "notin": "notin", "to": "to",
    "->": "to", "Rightarrow": "implies", "=>": "implies", "propto": "propto", "iff": "iff", "simeq": "approx",
    "Leftrightarrow": "iff", "ni": "ni", "leftrightarrow": "iff",
}  # fmt: skip
PRODUCTS = {"*": "mul", "cdot": "mul", "times": "mul", "/": "div", "div": "div"}
SUMS = {"+": "add", "-": "sub", "pm": "pm", "mp": "mp", "cup": "cup", "cap": "cap", "setminus": "setminus"}
OVER = frozenset(["overline", "vec", "hat", "tilde", "dot", "ddot", "widetilde", "underline", "overparen", "overbrace"])
FIGURES = frozenset(["angle", "triangle", "odot", "neg", "lnot", "forall", "exists", "measuredangle"])
BRACKETS = {"(": "(", "[": "[", "langle": "<"}
CLOSING = {")": ")", "]": "]", "rangle": ">"}
CALLED = frozenset("fghFGH")
"""Letters that are functions where a bracket follows: `f(x)`, but `a(x + 1)` is a product."""

MATRICES = {"matrix": "matrix", "pmatrix": "matrix", "bmatrix": "matrix", "Bmatrix": "matrix", "array": "matrix",
            "smallmatrix": "matrix", "vmatrix": "det"}  # fmt: skip
MATRIX = re.compile(
    r"(?P<open>[(\[]\s*)?\\begin\{(?P<kind>\w*matrix|array)\}\s*(?:(?<=array\})\{[lcr| ]*\})?(?P<rows>.*?)"
    r"\\end\{(?P=kind)\}(?(open)\s*[)\]])",
    re.DOTALL,
)
SUBSCRIPT_END = re.compile(r"[A-Za-z0-9]")


def read(text: str) -> Node | None:
    """The tree of a normalised text; None if any part of it is not understood."""
    try:
        reader = _Reader(text)
        node = reader.sequence()
        reader.expect_end()
    except (UnreadableError, RecursionError):
        return None
    return node


class _Reader(TokenStream):
    """Recursive descent."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self._matrices: list[Matrix] = []
        if r"\begin" in text:
            text = MATRIX.sub(lambda found: self._matrix(found, depth), text)
        super().__init__(split(text), depth)
        self._bars = 0

    def _matrix(self, found: re.Match[str], depth: int) -> str:
        if depth > 2 or found["kind"] not in MATRICES:
            raise UnreadableError
        rows = []
        for line in found["rows"].replace(r"\hline", "").strip().removesuffix(r"\\").split(r"\\"):
            rows.append(tuple(_entry(cell, depth + 1) for cell in line.split("&")))
        if len({len(row) for row in rows}) != 1:
            raise UnreadableError
        self._matrices.append(Matrix(MATRICES[found["kind"]], tuple(rows)))
        return rf" \placeholder{'abcdefghij'[len(self._matrices) - 1]} " if len(self._matrices) <= 10 else "?"

    # -- grammar, from the loosest binding to the tightest

    def sequence(self) -> Node:
        """Items by commas, semicolons, "and" and "or"; one item is itself."""
        items = [self._relation()]
        kinds: list[str] = []
        while self._is(",", ";", "or", "and"):
            kind = self._take()
            if kind == "," and self._is("and", "or"):  # the last comma of an English list
                kind = self._take()
            kinds.append(kind)
            items.append(self._relation())
        if not kinds:
            return items[0]
        if set(kinds) == {";"}:
            return Items("parts", tuple(items))
        if ";" in kinds:
            raise UnreadableError
        if "or" in kinds and "and" in kinds:
            raise UnreadableError
        kind = "or" if "or" in kinds else "and" if "and" in kinds else "list"
        return Items(kind, tuple(items))

    def _relation(self) -> Node:
        terms, signs = [self._ratio()], []
        while (value := self._peek()[1]) in RELATIONS and self._peek()[0] in ("mark", "command"):
            self._take()
            signs.append(RELATIONS[value])
            terms.append(self._ratio())
        return Relation(tuple(terms), tuple(signs)) if signs else terms[0]

    def _ratio(self) -> Node:
        parts = [self._sum()]
        while self._accept(":"):
            parts.append(self._sum())
        return Items("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def _sum(self) -> Node:
        if self._is("pm", "mp"):
            node: Node = Apply(self._take(), (Number(Fraction(0)), self._product()))
        else:
            node = self._product()
        terms: list[Node] = [node]
        while self._is(*SUMS):
            sign = SUMS[self._take()]
            right = self._product()
            if sign == "add":
                terms.append(right)
            elif sign == "sub":
                terms.append(Apply("neg", (right,)))
            else:
                terms = [Apply(sign, (_added(terms), right))]
        return _added(terms)

    def _product(self) -> Node:
        node, was_number = self._signed()
        while True:
            if self._is(*PRODUCTS):
                name = PRODUCTS[self._take()]
                right, was_number = self._signed()
                node = Apply(name, (node, right))
            elif self._starts_atom():
                if was_number and isinstance(node, Number):
                    mixed, was_number = self._mixed_behind(node)
                    if mixed is not node:
                        node = mixed
                        continue
                if self._peek()[0] == "number" and was_number:
                    raise UnreadableError  # 17 18
                right, was_number = self._power()
                node = Apply("mul", (node, right))
            else:
                return node

    def _mixed_behind(self, whole: Number) -> tuple[Node, bool]:
        r"""The mixed number that begins with `whole` (`1 1/2`, `1\frac12`) and False, or `whole` and True."""
        start, saved = self._place, list(self._tokens)
        tokens = self._tokens[start : start + 3]
        part: Node | None = None
        if whole.value.denominator == 1 and whole.places is None:
            if self._is("frac"):
                part, _ = self._power()
            elif [kind for kind, _ in tokens] == ["number", "mark", "number"] and tokens[1][1] == "/":
                above = number(self._take())
                self._take()
                part = Apply("div", (above, number(self._take())))
        if part is not None and _is_proper(part):
            return Apply("add", (whole, part)), False
        self._place, self._tokens = start, saved
        return whole, True

    def _signed(self) -> tuple[Node, bool]:
        """A factor with its signs, and whether it was nothing but a number. A mixed number has its sign as a whole."""
        if self._accept("-"):
            self._deeper()
            node, was_number = self._signed()
            self._depth -= 1
            if was_number and isinstance(node, Number):
                node, was_number = self._mixed_behind(node)
            return Apply("neg", (node,)), was_number
        if self._accept("+"):
            return self._signed()
        return self._power()

    def _power(self) -> tuple[Node, bool]:
        start = self._peek()[0]
        node = self._atom()
        plain = start == "number"
        while True:
            if self._accept("^", "**"):
                plain = False
                node = self._raised(node)
            elif self._accept("!"):
                plain = False
                node = Apply("factorial2" if self._accept("!") else "factorial", (node,))
            elif self._accept("%"):
                plain = False
                node = Apply("percent", (node,))
            elif self._is("'"):
                plain = False
                node = self._primed(node)
            elif self._is("_") and isinstance(node, Number | Symbol):
                plain = False
                node = self._subscripted(node, self._tokens[self._place - 1][1])
            else:
                return node, plain

    def _raised(self, base: Node) -> Node:
        if self._accept("circ") or self._is_group("circ"):
            return Apply("degree", (base,))
        if self._accept("'") or self._is_group("'"):
            return _with_prime(base)
        self._deeper()
        if self._is("{"):
            exponent = self._group()
        elif self._accept("-"):
            exponent = Apply("neg", (self._atom(),))
        else:
            exponent = self._atom()
            if self._accept("^"):
                exponent = self._raised(exponent)
        self._depth -= 1
        return Apply("pow", (base, exponent))

    def _is_group(self, value: str) -> bool:
        """Take `{value}` if it comes next."""
        here = [token for _, token in self._tokens[self._place : self._place + 3]]
        if here == ["{", value, "}"]:
            self._place += 3
            return True
        return False

    def _primed(self, node: Node) -> Node:
        while self._accept("'"):
            node = _with_prime(node)
        return self._called(node) if isinstance(node, Symbol) else node

    def _subscripted(self, node: Number | Symbol, written: str) -> Node:
        self._take()
        name = self._subscript()
        if isinstance(node, Number):  # a base: the digits are not decimal
            return Symbol(f"{written.lstrip('0') or '0'}_{name}")
        symbol = Symbol(f"{node.name}_{name}")
        return self._called(symbol) if symbol.name[0] in CALLED else symbol

    def _subscript(self) -> str:
        """What a subscript says, without spaces and braces."""
        if not self._accept("{"):
            kind, value = self._peek()
            if kind == "end" or (kind == "mark" and not SUBSCRIPT_END.match(value)):
                raise UnreadableError
            return self._take()
        depth, said = 1, []
        while True:
            kind, value = self._peek()
            if kind == "end":
                raise UnreadableError
            self._take()
            depth += (value == "{") - (value == "}")
            if not depth:
                return "".join(said)
            if value not in "{}":
                said.append(value if kind != "text" else value.replace(" ", ""))

    def _called(self, symbol: Symbol) -> Node:
        """`f(x)` where `f` is a function by its name."""
        if self._is("(") and (symbol.name[0] in CALLED or "'" in symbol.name):
            self._take()
            self._deeper()
            inside = self.sequence()
            self._depth -= 1
            self._expect(")")
            arguments = inside.items if isinstance(inside, Items) and inside.kind == "list" else (inside,)
            return Apply(f"call {symbol.name}", arguments)
        return symbol

    # -- atoms

    def _starts_atom(self) -> bool:
        kind, value = self._peek()
        if kind in ("number", "name", "matrix"):
            return True
        if kind == "mark":
            return value in "({[" or (value == "|" and not self._bars)
        return kind == "command" and (
            value in FUNCTIONS or value in GREEK or value in OVER or value in FIGURES or value in ("{", "frac", "sqrt",
            "binom", "langle", "lfloor", "lceil", "boxed")
        )  # fmt: skip

    def _atom(self) -> Node:
        kind, value = self._peek()
        if kind == "number":
            self._take()
            return number(value)
        if kind == "name":
            self._take()
            symbol = Symbol(value)
            return symbol if self._is("_") else self._called(symbol)
        if kind == "matrix":
            self._take()
            place = "abcdefghij".find(value)
            if len(value) != 1 or not 0 <= place < len(self._matrices):
                raise UnreadableError  # the answer wrote our own placeholder
            return self._matrices[place]
        if kind == "mark":
            if value in BRACKETS:
                return self._bracketed()
            if value == "{":
                return self._group()
            if value == "|":
                return self._absolute()
            raise UnreadableError
        if kind == "command" and value == "langle":
            return self._bracketed()
        if kind == "command":
            self._take()
            return self._command(value)
        raise UnreadableError

    def _bracketed(self) -> Node:
        self._deeper()
        left = BRACKETS[self._take()]
        bars, self._bars = self._bars, 0
        inside = self.sequence()
        self._bars = bars
        self._depth -= 1
        value = self._peek()[1]
        if value not in CLOSING or self._peek()[0] not in ("mark", "command"):
            raise UnreadableError
        right = CLOSING[self._take()]
        if isinstance(inside, Items) and inside.kind in ("list", "parts"):
            return Items(left + right, inside.items)
        if left + right in ("()", "[]"):
            return inside
        if left + right == "<>":
            return Items("<>", (inside,))
        raise UnreadableError

    def _group(self) -> Node:
        """{...}: a set where it holds several items, else what it holds."""
        self._deeper()
        self._expect("{")
        node = self._braces("}")
        self._depth -= 1
        return Items("set", node.items) if isinstance(node, Items) and node.kind == "list" else node

    def _set(self) -> Node:
        r"""\{...\}, after its opening brace."""
        self._deeper()
        if self._accept("}"):
            self._depth -= 1
            return Symbol("emptyset")
        node = self._braces("}")
        self._depth -= 1
        if isinstance(node, SetBuilder):
            return node
        return Items("set", node.items if isinstance(node, Items) and node.kind == "list" else (node,))

    def _braces(self, closing: str) -> Node:
        bars, self._bars = self._bars, 1  # a bar in braces means "such that"
        first = self.sequence()
        self._bars = bars
        if self._is("|"):
            self._take()
            condition = self.sequence()
            self._expect(closing)
            return SetBuilder(first, condition)
        self._expect(closing)
        if isinstance(first, Items) and first.kind == "ratio" and isinstance(first.items[0], Symbol):
            raise UnreadableError
        if isinstance(first, Relation) and isinstance(first.terms[0], Items) and first.terms[0].kind == "ratio":
            ratio = first.terms[0]  # {x : x > 0}
            if len(ratio.items) == 2:
                return SetBuilder(ratio.items[0], Relation((ratio.items[1], *first.terms[1:]), first.signs))
        return first

    def _absolute(self) -> Node:
        self._deeper()
        self._take()
        bars, self._bars = self._bars, 1
        inside = self._sum()
        self._bars = bars
        self._expect("|")
        self._depth -= 1
        return Apply("abs", (inside,))

    def _argument(self) -> Node:
        r"""The next argument of \frac or \binom: a group, or one digit, letter or command."""
        if self._is("{"):
            return self._group()
        kind, value = self._peek()
        if kind == "number":
            if not value[0].isdigit():
                raise UnreadableError
            if len(value) > 1:
                self._tokens[self._place] = ("number", value[1:])
                return number(value[0])
            self._take()
            return number(value)
        return self._atom()

    def _command(self, name: str) -> Node:
        if name in FUNCTIONS:
            return self._function(SAME_FUNCTION.get(name, name))
        if name in ("frac", "binom"):
            above = self._argument()
            return Apply("div" if name == "frac" else name, (above, self._argument()))
        if name == "sqrt":
            return self._root()
        if name == "{":
            return self._set()
        if name in ("lfloor", "lceil"):
            inside = self.sequence()
            self._expect("rfloor" if name == "lfloor" else "rceil")
            return Apply("floor" if name == "lfloor" else "ceil", (inside,))
        if name == "boxed":
            return self._group()
        if name in OVER:
            return self._over(name)
        if name in FIGURES:
            return self._figure(name)
        if name in ("imath", "jmath"):
            return Symbol(name[0])
        if name in GREEK:
            return Symbol(name)
        raise UnreadableError

    def _root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self._accept("["):
            degree = self._sum()
            self._expect("]")
        self._deeper()
        inside = self._group() if self._is("{") else self._atom()
        self._depth -= 1
        return Apply("root", (inside, degree))

    def _function(self, name: str) -> Node:
        self._deeper()
        extra: tuple[Node, ...] = ()
        power: Node | None = None
        while self._is("_", "^"):
            if self._accept("_"):
                extra = (self._argument() if self._is("{") else self._atom(),)
            else:
                self._take()
                power = self._group() if self._is("{") else self._signed()[0]
        node = self._function_argument()
        self._depth -= 1
        arguments = node.items if isinstance(node, Items) and node.kind in ("list", "()") else (node,)
        if power == Apply("neg", (Number(Fraction(1), digits=1),)) and name in INVERSE:
            return Apply(INVERSE[name], arguments)
        applied = Apply(name, (*arguments, *extra))
        return Apply("pow", (applied, power)) if power is not None else applied

    def _function_argument(self) -> Node:
        if self._is("("):
            node = self._bracketed()
            while self._accept("!"):
                node = Apply("factorial", (node,))
            return node
        if self._is("{"):
            return self._group()
        node, was_number = self._signed()
        while self._starts_atom() and self._peek()[1] not in FUNCTIONS and not self._is("(", "{", "["):
            if self._peek()[0] == "number" and was_number:
                raise UnreadableError
            right, was_number = self._power()
            node = Apply("mul", (node, right))
        while self._is("/") and self._tokens[self._place + 1][0] in ("number",):  # sin pi/4
            self._take()
            right, _ = self._power()
            node = Apply("div", (node, right))
        return node

    def _over(self, name: str) -> Node:
        """An accent makes a symbol of its own. Repeating decimals were replaced before (tokens.py)."""
        before = self._tokens[self._place - 2] if self._place > 1 else ("", "")
        if name == "overline" and before[0] == "number":
            raise UnreadableError
        return Symbol(f"{name}({self._subscript() if self._is('{') else self._take()})")

    def _figure(self, name: str) -> Node:
        said = []
        while self._peek()[0] in ("name", "number") or self._is("_", "'"):
            said.append(self._subscript() if self._accept("_") else self._take())
        if not said:
            raise UnreadableError
        return Symbol(f"{name}({' '.join(said)})")


INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot"}


def _entry(cell: str, depth: int) -> Node:
    reader = _Reader(cell, depth)
    node = reader.sequence()
    reader.expect_end()
    return node


def _added(terms: Sequence[Node]) -> Node:
    return terms[0] if len(terms) == 1 else Apply("add", tuple(terms))


def _with_prime(node: Node) -> Node:
    if not isinstance(node, Symbol):
        raise UnreadableError
    return Symbol(f"{node.name}'")


def _is_proper(node: Node) -> bool:
    match node:
        case Apply("div", (Number(above), Number(below))):
            return above.denominator == below.denominator == 1 and 0 < above < below
    return False
