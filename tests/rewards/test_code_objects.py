"""Objects, functions and values of the program's in the hands of its test: state, helpers, value types, forgeries."""

# ruff: noqa: E501  (programs)

import pytest

from megatron_r1.rewards.code import score_code
from megatron_r1.rewards.sandbox import Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(allow_unisolated=True, wall_seconds=20.0, memory_mib=256)) as opened:
        yield opened


def asserts(*texts, entry_point="f"):
    return {"asserts": list(texts), "entry_point": entry_point}


CACHE = """
from collections import OrderedDict
class LRUCache:
    def __init__(self, capacity):
        self.capacity, self.items = capacity, OrderedDict()
    def get(self, key):
        if key not in self.items: return -1
        self.items.move_to_end(key)
        return self.items[key]
    def put(self, key, value):
        self.items[key] = value
        self.items.move_to_end(key)
        if len(self.items) > self.capacity: self.items.popitem(last=False)
"""
CACHE_TEST = """
cache = LRUCache(2)
cache.put(1, 10)
cache.put(2, 20)
assert cache.get(1) == 10
cache.put(3, 30)
assert [cache.get(k) for k in (1, 2, 3)] == [10, -1, 30]
other = LRUCache(capacity=1)
assert other.get(1) == -1 and cache.capacity == 2 and len(cache.items) == 2
"""
POINT = """
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __lt__(self, other): return self.x < other.x
    def __repr__(self): return f"Point({self.x}, {self.y})"
    def __len__(self): return 2
    def __iter__(self): return iter((self.x, self.y))
def f(p): return p + p
"""
NODE = """
class Node:
    def __init__(self, val, next=None): self.val, self.next = val, next
def reverse(head):
    last = None
    while head: head.next, last, head = last, head, head.next
    return last
"""
BANK = """
class Overdrawn(ValueError): pass
class Account:
    def __init__(self, amount): self._amount = amount
    @property
    def amount(self): return self._amount
    def draw(self, n):
        if n > self._amount: raise Overdrawn("too much", n)
        self._amount -= n
        return self
    def __enter__(self): return self
    def __exit__(self, *_): self._amount = 0
"""


@pytest.mark.parametrize(
    ("entry_point", "program", "test", "outcome"),
    [
        # state that is kept in objects of the program's classes
        ("LRUCache", CACHE, CACHE_TEST, "passed"),
        ("LRUCache", CACHE.replace("> self.capacity", "> 9"), CACHE_TEST, "wrong"),
        ("LRUCache", CACHE, CACHE_TEST.replace("len(cache.items) == 2", "len(cache.items) == 3"), "wrong"),
        ("LRUCache", "def g(): pass", CACHE_TEST, "crashed"),
        ("f", POINT, "assert f(Point(1, 2)) == Point(2, 4) and f(Point(1, 2)) != Point(2, 5)", "passed"),
        ("f", POINT, "assert str(f(Point(1, 2))) == 'Point(2, 4)' and list(f(Point(1, 2))) == [2, 4]", "passed"),
        ("f", POINT, "assert Point(1, 2) < Point(2, 1) and (f(Point(1, 2)) + Point(1, 1)).x == 3", "passed"),
        ("f", POINT, "assert isinstance(f(Point(1, 2)), Point) and not isinstance(3, Point)", "passed"),
        ("f", POINT, "p = Point(1, 2)\np.x = 5\nassert f(p).x == 10 and len(p) == 2", "passed"),
        ("f", POINT, "assert sorted([Point(3, 0), Point(1, 0)])[0].x == f(Point(0, 0)).x + 1", "passed"),
        ("reverse", NODE, "n = reverse(Node(1, Node(2)))\nassert (n.val, n.next.val, n.next.next) == (2, 1, None)", "passed"),
        ("reverse", NODE, "n = reverse(Node(1, Node(2)))\nassert n.next.next is not None", "wrong"),
        ("Account", BANK, "a = Account(5)\nassert a.draw(2).draw(1).amount == 2", "passed"),
        ("Account", BANK, "try:\n    Account(5).draw(6)\n    assert False\nexcept Overdrawn as e:\n    assert e.args == ('too much', 6)", "passed"),
        ("Account", BANK, "try:\n    Account(5).draw(6)\n    assert False\nexcept ValueError:\n    pass", "passed"),
        ("Account", BANK, "try:\n    Account(5).draw(6)\n    assert False\nexcept KeyError:\n    pass", "crashed"),
        ("Account", BANK, "with Account(5) as a:\n    assert a.amount == 5\nassert a.amount == 0", "passed"),
        ("Account", BANK, "assert not hasattr(Account(5), 'limit') and hasattr(Account(5), 'draw')", "passed"),
        # helpers and constants of the program's
        ("f", "MOD = 7\ndef g(x): return x % MOD\ndef f(x): return g(x * x)", "assert f(4) == 16 % MOD == g(16) == 2", "passed"),
        ("f", "def f(x): return x", "assert f(4) == g(4)", "crashed"),
        ("f", "from enum import Enum\nclass Color(Enum): RED = 1\ndef f(): return Color.RED", "assert f() is Color.RED and f().name == 'RED'", "passed"),
        ("Solution().f", "class Solution:\n    def f(self, x): return x + 1\n    def g(self, x): return 0", "assert Solution().f(1) == 2 and Solution().g(1) == 0", "passed"),
        # functions go both ways
        ("f", "def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x + 1, [1, 2]) == [2, 3] and f(str, [1]) == ['1']", "passed"),
        ("f", "def f(n): return lambda x: x + n", "assert f(2)(3) == 5 and f(1)(f(1)(1)) == 3", "passed"),
        ("f", "def f(g): return lambda x: g(x) * 2", "@f\ndef h(x): return x + 1\nassert h(2) == 6", "passed"),
        ("f", "def f(g): return g()", "def fail(): raise KeyError('k')\ntry:\n    f(fail)\n    assert False\nexcept KeyError as e:\n    assert e.args == ('k',)", "passed"),
        ("f", "def f(g, n): return g(n)", "assert f(lambda n: 1 if n == 0 else n * f(lambda m: m - 1, n), 3) == 6", "passed"),
        ("f", "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1", "g = f()\nassert [next(g) for _ in range(2000)] == list(range(2000))", "passed"),
        ("f", "import itertools\ndef f(): return zip('ab', itertools.count())", "assert list(f()) == [('a', 0), ('b', 1)]", "passed"),
        ("f", "def f(g, xs): return g(xs)", "assert f(len, [1, 2]) == 2 and f(sorted, [2, 1]) == [1, 2]", "passed"),
        ("f", "def f(g): return g('2 + 3')", "assert f(eval) == 5", "refused"),
        ("f", "def f(g): return g(80)", "import sys\nf(sys.exit)\nassert f(abs) == 0", "crashed"),
        ("f", "def f(): return len", "assert f() is len", "passed"),
        ("f", "def f(n):\n    for i in range(n):\n        got = yield i\n        if got: yield got", "g = f(3)\nassert next(g) == 0 and g.send(7) == 7 and list(g) == [1, 2]", "passed"),
        ("f", "seen = []\ndef f():\n    for i in range(9):\n        seen.append(i)\n        yield i\ndef last(): return seen[-1]", "g = f()\nassert [(next(g), last()) for _ in range(4)] == [(i, i) for i in range(4)]", "passed"),
        # the method of an object that the test makes
        ("Solution().f", "class Solution:\n    def f(self, xs): xs.sort()", "s = Solution()\nxs = [2, 1]\ns.f(xs)\nassert xs == [1, 2]", "passed"),
        ("Solution().f", "class Solution:\n    def f(self, xs): pass", "s = Solution()\nxs = [2, 1]\ns.f(xs)\nassert xs == [1, 2]", "wrong"),
        ("V", "class V:\n    def __init__(s, *v): s.v = v\n    def __neg__(s): return V(*(-x for x in s.v))\n    def __abs__(s): return sum(x * x for x in s.v) ** 0.5", "assert (-V(3, 4)).v == (-3, -4) and abs(V(3, 4)) == 5.0", "passed"),
        # what a call does to its arguments, where its result is dropped
        ("f", "def f(xs): xs.sort()", "xs = [3, 1]\nf(xs)\nassert xs == [1, 3]", "passed"),
        ("f", "def f(b): b[0][1] = 'X'; b.append([])", "b = [['a', 'b']]\nrow = b[0]\nf(b)\nassert row == ['a', 'X'] and len(b) == 2", "passed"),
        ("f", "def f(d, k): del d[k]; d['n'] = 1", "d = {'k': 0}\nf(d, 'k')\nassert d == {'n': 1}", "passed"),
        ("f", "def f(s): s.add(3)", "def check(candidate):\n    s = {1}\n    candidate(s)\n    assert s == {1, 3}", "passed"),
        ("f", "def f(xs): xs.clear(); return xs", "xs = [3, 1]\nassert f(xs) == sorted(xs)", "wrong"),
        # a result of the program's own class answers nothing by itself
        ("f", "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()", "assert f(1) == 5", "crashed"),
        ("f", "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\ndef f(x): return E()", "E\nassert f(1) == 5", "wrong"),
        ("f", "class E:\n    def __eq__(s, o): return True\n    def __init__(s, v=0): s.v = v\ndef f(x): return E()", "assert f(1) == E(5)", "wrong"),
        ("f", "class E:\n    def __sub__(s, o): return 0\n    def __abs__(s): return 0\ndef f(x): return E()", "E\nassert abs(f(1) - 4.0) < 1e-6", "crashed"),
        ("f", "class E:\n    def __rsub__(s, o): return 0\ndef f(x): return E()", "E\nassert 4.0 - f(1) == 0", "crashed"),
        ("f", "class E:\n    def __gt__(s, o): return True\ndef f(x): return E()", "E\nassert f(1) > 3", "crashed"),
        ("f", "class E:\n    def __lt__(s, o): return True\ndef f(x): return E()", "E\nassert 3 > f(1)", "crashed"),
        ("f", "class E:\n    def __contains__(s, o): return True\ndef f(x): return E()", "E\nassert 3 in f(1)", "crashed"),
        ("f", "class E:\n    def __getattr__(s, n): return lambda *a: True\ndef f(x): return E()", "assert f(1).startswith('secret')", "crashed"),
    ],
)  # fmt: skip
def test_objects_and_functions_of_the_program(box, entry_point, program, test, outcome):
    verdict = score_code(asserts(test, entry_point=entry_point), program, box)
    assert verdict.outcomes == (outcome,), verdict


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("deque([1, 2], 3)", "deque([1, 2]) and f().maxlen == 3"),
        ("Decimal('0.10')", "Decimal('0.1') and str(f()) == '0.10'"),
        ("Fraction(2, 4)", "Fraction(1, 2)"),
        ("date(2024, 2, 29)", "date(2024, 2, 29) and f().weekday() == 3"),
        ("datetime(2024, 2, 29, 1, 2, 3, 4, timezone.utc)", "datetime(2024, 2, 29, 1, 2, 3, 4, timezone.utc)"),
        ("time(1, 2)", "time(1, 2)"),
        ("timedelta(1, 2)", "timedelta(days=1, seconds=2)"),
        ("{'a': 1, 'b': 2}.keys()", "{'a', 'b'} and sorted(f()) == ['a', 'b']"),
        ("{'a': [1]}.items()", "{'a': [1]}.items() and list(f()) == [('a', [1])]"),
        ("OrderedDict(a=1, b=2)", "OrderedDict([('a', 1), ('b', 2)]) and f() != OrderedDict([('b', 2), ('a', 1)])"),
        ("defaultdict(list, a=[1])", "{'a': [1]} and f()['z'] == []"),
        ("defaultdict(lambda: 7, a=1)", "{'a': 1}"),
        ("Counter('aab')", "Counter(a=2, b=1) and f()['z'] == 0 and f().most_common(1) == [('a', 2)]"),
        ("namedtuple('P', 'x y')(1, 2)", "(1, 2) and f().y == 2"),
        ("bytearray(b'ab')", "b'ab' and isinstance(f(), bytearray)"),
        ("[Fraction(1, 3), {date(2024, 1, 1): deque([Decimal(1)])}]", "[Fraction(1, 3), {date(2024, 1, 1): deque([1])}]"),
        ("int", "int"),
        ("...", "..."),
        ("slice(1, 2)", "slice(1, 2)"),
        ("array('i', [1, 2])", "array('i', [1, 2])"),
    ],
)  # fmt: skip
def test_value_types_of_the_standard_library_arrive_as_themselves(box, expression, expected):
    imports = (
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "from datetime import *\nfrom array import array\n"
    )
    verdict = score_code(asserts(f"{imports}assert f() == {expected}"), f"{imports}def f(): return {expression}", box)
    assert verdict.correct, verdict


@pytest.mark.parametrize(
    ("program", "test", "outcome"),
    [
        (r"re.match(r'(a)(?P<n>b)?', s)", "m = f('ab')\nassert m and m.groups() == ('a', 'b') and m['n'] == 'b' and m.span() == (0, 2)", "passed"),
        (r"re.match(r'(a)(?P<n>b)?', s)", "assert f('c') is None", "passed"),
        (r"re.search(r'^b|(?<=a)b$', s)", "import re\nassert f('xab').start() == 2 and isinstance(f('xab'), re.Match)", "passed"),
        (r"re.fullmatch(r'a|ab', s)", "assert f('ab').group() == 'ab'", "passed"),
        (r"re.compile(r'\d+').search(s, 2, 4)", "assert f('123456').group() == '34' and f('123456').string == '123456'", "passed"),
        (r"re.search(r'b', s)", "assert f('ab').start() == 0", "wrong"),
        (r"re.compile('a', re.I)", "assert f('').match('A')", "passed"),
        (r"list(re.finditer('a', s))", "assert [m.start() for m in f('aba')] == [0, 2]", "passed"),
    ],
)  # fmt: skip
def test_matches_of_patterns_arrive(box, program, test, outcome):
    verdict = score_code(asserts(test), f"import re\ndef f(s): return {program}", box)
    assert verdict.outcomes == (outcome,), verdict
