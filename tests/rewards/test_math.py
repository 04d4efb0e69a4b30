"""Equivalence of written answers: what must be equal, and what must not be talked into being equal."""

import random
import time

import pytest

from megatron_r1.rewards.math import MAX_ANSWER_CHARACTERS, answers_equal

EQUAL = [
    ("18", "18"),
    ("18", " 18. "),
    ("18", "18.00"),
    ("18", "$18$"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("18", r"\boxed{18}"),
    ("18", r"\(18\)"),
    ("18", "18 dollars"),
    ("5 dollars", "5"),
    (r"18\text{ cm}", "18"),
    (r"18\text{ cm}", "18 cm"),
    ("18", "The answer is 18."),
    ("18", r"18 \text{ eggs}"),
    ("1000", "1,000"),
    ("1000", "1e3"),
    ("1000", "10**3"),
    ("-30", "- 30"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", r"$\frac{1}{2}$"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"2\pi", "2*pi"),
    ("x+1", "1+x"),
    ("(0,1]", r"0<x\le1"),
    (r"\{1,2\}", "2, 1"),
    ("5", "x = 5"),
    ("50%", "0.5"),
    ("Paris", r"\text{paris}"),
    ("B", "(B)"),
    ("18", "18.0 dollars"),
    ("18", "18 km/h"),
    ("18", "$18.00"),
    ("18", "$18 in total"),
    ("18", "Answer: 18"),
    ("18", "x = 18 dollars"),
    ("18", "x = $18$"),
    ("18", r"x_1 = 18"),
    ("18", r"\theta = 18"),
    ("18", "**18**"),
    ("-18", "The answer is -18"),
    ("-3", "\u22123"),
    ("18%", "18 percent"),
    ("18%", r"18\%"),
    ("1/2", "1/2 cup"),
    ("1/2", "0.5 cups"),
    (r"\frac12", "0.5"),
    ("1,000", "1000"),
    ("1,000", "1,000 dollars"),
    ("1000", r"1{,}000"),
    ("1000", r"1\,000"),
    ("(1,2)", "(1, 2)"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x=5", "x = 5.0"),
    ("2x+1", "y=2x+1"),
    ("f(x)=2x", "2x"),
    ("x=1 or x=2", "1,2"),
    ("x=1 or x=2", "x=2 or x=1"),
    ("x=1,y=2", "x=1, y=2"),
    ("x^2+y^2=1", "y^2+x^2=1"),
    ("3 km", "3.0 km"),
    ("3 km", r"3\text{ km}"),
    (r"3\text{ km}", "3 KM"),
    (r"\frac{1}{2}\text{ cm}", "0.5 cm"),
    ("5 hours", "5 hour"),
    ("5 PM", "5 pm"),
    ("even", "Even."),
]
DIFFERENT = [
    ("18", "17"),
    ("18", "-18"),
    ("18", ""),
    ("18", "17 or 18"),
    ("18", "17, 18"),
    ("18", "17 18"),
    ("18", "it is 17, no, 18"),
    ("18", "17 dollars or 18 dollars"),
    ("18", "18 = 17"),
    ("18", "eighteen or so"),
    ("35", "18 17"),
    ("(0,1]", r"0<x<1"),
    ("x+1", "x-1"),
    ("Paris", "London"),
    ("1/2", "0.6"),
    ("18", "18" + " " * MAX_ANSWER_CHARACTERS),
    ("3 km", "3 m"),
    ("3 km", "3 kilometers"),
    ("5 PM", "5 AM"),
    ("5 PM", "6 PM"),
    ("May 5", "June 5"),
    ("May 5, 2020", "May 2020, 5"),
    ("5 dollars", "6"),
    ("5 hundred dollars", "5"),
    ("minus 5 degrees", "5"),
    ("5 to 7 dollars", "5"),
    ("5 less x", "x less 5"),
    ("even", "odd"),
    ("18", "minus 18"),
    ("18", "negative 18"),
    ("18", r"\text{minus }18"),
    ("18", "The answer is -18"),
    ("-18", "The answer is 18"),
    ("18", "not 18"),
    ("18", "no, 18"),
    ("18", "it isn't 18"),
    ("18", r"\text{not }18"),
    ("18", "18 million"),
    ("18", r"18 \text{ million}"),
    ("18", "18 thousand dollars"),
    ("18", "18 hundredths"),
    ("18", "18 dozen"),
    ("18", "18k dollars"),
    ("18", "18 K people"),
    ("18", "half of 18"),
    ("18", "18 and a half"),
    ("18", "18 point five"),
    ("18", "at least 18 eggs"),
    ("18", "18 or nineteen"),
    ("18", "18 eggs, 17 hens"),
    ("18", ".18 dollars"),
    ("12", r"\frac12 cm"),
    ("2", "xy+2"),
    ("18", "it is x-18 eggs"),
    ("18", "1800%"),
    ("18", "18 percent"),
    ("0.18", "18%"),
    ("18", "17=18"),
    ("18", "x=17=18"),
    ("18", "-x=18"),
    ("18", "x^2=18"),
    ("18", "1/x = 18"),
    ("18", r"\pi=18"),
    ("18", "x = minus 18"),
    ("18", "x == 18"),
    ("18", "17 => 18"),
    ("18", "17 -> 18"),
    ("18", r"17 \to 18"),
    ("18", r"x \neq 18"),
    ("x=18", "y=18"),
    ("x=1 or x=2", "x=1 or x=3"),
    ("x=1,y=2", "y=1, x=2"),
    ("35", r"17 \quad 18"),
    ("35", "$17$ $18$"),
    ("18", r"17 \boxed{18}"),
    ("18", "18_2"),
    ("18", "18!"),
    ("18", "18..."),
    ("18", r"\pm 18"),
]


# What users' models and files write (public reports, published reference files), and its neighbours.
REPORTED_EQUAL = [
    ("18", "The answer is $18$."), ("18", r"Therefore, the final answer is $\boxed{18}$."),
    (r"\frac{3}{4}", "The answer is 3/4."), ("(3,4)", "The coordinates are (3, 4)."), ("2, 3", "$2$ and $3$"),
    ("42", r"\boxed{42} apples"), ("4", "**Answer:** 4."), ("42", r"Thus the answer is \[\boxed{42}\]"),
    ("3, 5, 7", r"\boxed{3}, \boxed{5}, \boxed{7}"), ("xy+1", "1+xy"), ("2ab", "2ba"),
    ("x^2+xy+y^2", "x^2 + xy + y^2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)"),
    (r"1-\frac1{\mathrm e}", r"1-\frac1e"), (r"\sqrt{1/n}", r"1/\sqrt n"), ("a_n=2n-1", "a_{n}=2n-1"),
    ("f(x)=2x", r"f\left(x\right)=2x"), ("204", "m+n=204"), ("64", "8 * 8 = 64"), ("x+y-3=0", "y=3-x"),
    ("y=2x+1", "2x-y+1=0"), (r"(-\infty,-3)\cup(4,\infty)", "x<-3 or x>4"), ("42", r"42\,\text{cm}"),
    ("42", r"42\text{ cm}^2"), ("42", r"42 \text{ m/s}"), ("64", "€64"), ("64", "64 €"), ("2", "2。"), ("2", "答案是2"),
    ("2", "2元"), ("12", "１２"), ("-5", "–5"), (r"\sqrt2", "√2"), (r"\frac12", "½"), ("x^2", "x²"), (r"\infty", "∞"),
    (r"30^\circ", "30°"), ("30", "30°"), ("18", "1\u200b8"), ("18", "There are 18 eggs left over."),
    ("18", "He needs 18 more pens."), ("18", "18 points"), ("A", "(A) 5"), ("A", "Option A"), ("A", "Answer: A"),
    ("ABD", "A, B, D"), ("1:2:3", "2:4:6"), ("1:2", "1/2"), ("18", "Answer: 18 dollars"),
    ("x=5", "The solution is x = 5."), ("5", "The solution is $x = 5$."),
    (r"\frac{1}{9}", r"Thus, the probability that the sum rolled is 9 is \(\boxed{\frac{1}{9}}\)."),
    ("420", r"Therefore, the value of \(10.0000198 \cdot 5.99\) to the nearest whole number is \(\boxed{420}\)."),
    ("4:30 p.m.", r"\boxed{4:30 \text{ p.m.}}"), ("0.5", ".5"), ("1/3", "0.333333"), ("2x", "f(x)=2x"),
    (r"\pm 3", "3, -3"), (r"x=\pm 3", "x=3 or x=-3"), (r"e^{i\pi}", "-1"), (r"\log_2 8", "3"),
    (r"\sin 30^\circ", r"\frac12"), (r"(-\infty, 3)", "x<3"), (r"x\ne 3", r"(-\infty,3)\cup(3,\infty)"),
    (r"\{x|-2\leq x < 1\}", "[-2,1)"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("(x-1)(x+2)", "x^2+x-2"),
    ("2^{10}", "1024"), ("10!", "3628800"), (r"1\frac12", "1.5"), (r"36\sqrt{7}", r"36\sqrt{7}cm^{3}"),
    ("20 $cm^{2}$", "20"), (r"6\frac23", "20/3"), ("8;$-2$", "8, -2"), ("0.30", "0.30000000000000004"),
    (r"\frac{1}{15}", "0.066667"), ("$18", "18"), ("B", "The answer is (B)."), ("B", "b"),
    ("even", "The number is even."), ("yes", "Yes."), ("18", "So Janet makes $18 every day at the farmers' market."),
    ("10", "The answer is 10 hours."), ("2", "The area is 2 cm^2."), ("-2", "x = -2"),
    (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"), (r"\ln 2", r"\log_e 2"), ("m+n=204", "204"), ("m=5", "5"),
]  # fmt: skip
REPORTED_DIFFERENT = [
    (r"\frac{m}{M}", r"\frac{M}{m}"), (r"\frac{mg}{M+m}", r"\frac{Mg}{M+m}"), (r"\Gamma", r"\gamma"),
    (r"\Omega^2R", r"\omega^2R"), ("5 MW", "5 mW"), (r"\frac N2", r"\frac n2"),
    (r"1.6\times10^{-19}", r"9.1\times10^{-31}"), ("0.00000015", "0.00000024"),
    (r"\frac1{2^{60}}", r"\frac1{3^{60}}"), ("e^{-40}", "2e^{-40}"), (r"\sqrt{10^{40}+1}", "10^{20}"),
    (r"\frac1{2004!}", r"\frac1{2006!}"), (r"\frac{2^{2005}+1}{3\cdot2^{2006}}", r"\frac{2^{2005}}{3\cdot2^{2006}}"),
    ("1011_2", "1011_3"), ("777_8", "777_9"), ("52_8", "52_{9}"), ("f''(x)", "f'(x)"), ("y''+y=0", "y'+y=0"),
    ("x'", "x"), ("1:2:3", "1:3:2"), ("18", r"17 \equiv 18"), ("18", "The answer is 17 or 18."),
    ("18", "The answer is not 18."), ("18", r"\boxed{17} or \boxed{18}"), ("18", r"It is not \boxed{18}"),
    ("18", r"\boxed{18} million"), ("18", "The answer is 17. The answer is 18."), ("10^{10^{10}}", "10^{10^{10}}+1"),
    ("2^{1000000}+1", "2^{1000000}"), ("A", "(A) 5 or (B) 6"), ("A", "A or B"), ("ABD", "AB"), ("A", "B"),
    ("4:30 p.m.", "2:15 p.m."), ("4:30", "2:15"), ("abc", "abd"), ("listen", "silent"), ("18", "18 or more"),
    ("18", "more than 18"), ("18", "over 18 eggs"), ("1,2", "(2,1)"), ("(1,2)", "(2,1)"), ("x<3", r"x\le 3"),
    ("x<3", "x>3"), ("1", "x - x + 1"), ("y=2x+1", "y=2x+2"), ("5", "5 thousand"), ("5", r"5\text{ million}"),
    ("|x|", "x"), (r"\sqrt{x^2}", "x"), ("x^2", "x^2+10^{-30}"), ("3", "2万"), ("2", "2万"), ("5", "不是5"),
    ("12", "1 2"), ("0.5", "0.51"), ("1/3", "0.33"), ("1000000", "1000001.0"), ("12345.5", "12345.45"),
    (r"\sin x", r"\cos x"), ("n!", "n"), (r"\binom{10}{3}", "121"), ("[1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"),
    ("18", "2x=18"), ("18", r"\frac{18}{0}"), ("-1", "1"), ("x+y=3", "x-y=3"), ("i", "1"), ("1+i", "1-i"),
    ("e", "2.71828"), ("2", "二"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), EQUAL + REPORTED_EQUAL)
def test_same_answer_in_another_spelling_is_equal(reference, answer):
    assert answers_equal(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT + REPORTED_DIFFERENT)
def test_wrong_or_hedged_answer_is_not_equal(reference, answer):
    assert not answers_equal(reference, answer)


@pytest.mark.parametrize(
    "question",
    ["What percentage of the eggs are broken?", "By what percent did it rise?", "How many % are left?", "占百分之几？"],
)
def test_percent_sign_may_be_left_out_where_a_percentage_is_asked_for(question):
    assert answers_equal("18", "18%", question) and answers_equal("18%", "18", question)
    assert answers_equal("18", "It rose by 18 percent.", question)
    assert not answers_equal("18", "0.18", question) and not answers_equal("18", "17%", question)


@pytest.mark.parametrize("question", ["", "How many eggs are left?", "60% of the eggs are sold. How many are left?"])
def test_percent_sign_matters_otherwise(question):
    assert not answers_equal("18", "18%", question)


def test_times_of_day_are_no_ratios_unless_a_ratio_is_asked_for():
    assert not answers_equal("4:30", "2:15") and answers_equal("4:30", "4:30 p.m.")
    assert answers_equal("1:20", "2:40", "What is the ratio of their areas?")


CHEAP = [
    "18!!", "(18!)!", "10^{10^{10}}", "9^{9^{9^{9}}}", "1000000000!", r"\binom{1000000}{500000}", "(x+1)^{100000}",
    "(" * 300 + "18" + ")" * 300, "{" * 900, "x^{" * 300 + "2" + "}" * 300, "|" * 500, "-" * 1000 + "18", "1" * 1999,
    r"\frac" * 300, r"\sqrt" * 300 + "2", "+".join(["x"] * 900), "18," * 600, "a" * 1900, r"\sin" * 400 + "1",
    "2^{2^{2^{2^{2^{2^2}}}}}", r"\sin(10^{10^{10}})", r"e^{e^{e^{e^{e}}}}", "1e9999", "10^{-10^{12}}",
    "((1.1)^{1000000})^{1000000}",
    "the " * 500,
    "+".join([r"\sin 1"] * 90) + "+10^{-9000}", "is " * 600 + "18", "$" * 1999, r"\text{" * 300,
    "18 or " * 300 + "18", "0." + "3" * 1900,
]  # fmt: skip


@pytest.mark.parametrize("answer", CHEAP)
def test_no_answer_costs_more_than_a_moment(answer):
    begun = time.process_time()
    for reference in ("18", r"\frac{x+1}{y}", "(1,2)", "x=5"):
        answers_equal(reference, answer)
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("text", ["10^{10^{10}}", "9^{9^{9^{9}}}", "(18!)!", r"\binom{10^9}{10^8}"])
def test_values_that_nobody_can_hold_are_compared_by_their_form(text):
    assert answers_equal(text, text.replace("{", " {"))
    assert answers_equal(text, "1 + " + text) is False
    assert answers_equal(text, "18") is False


def test_odd_characters_raise_nothing():
    draw = random.Random(0)
    alphabet = [
        *list(r"0123456789xyeifn+-*/^_=<>!'|:;,.()[]{}&%$\ "),
        r"\frac",
        r"\sqrt",
        r"\text{",
        r"\boxed{",
        "or ",
        "½",
        "是",
        "²",
    ]
    for _ in range(3000):
        answer = "".join(draw.choices(alphabet, k=draw.randint(1, 25)))
        assert answers_equal("18", answer) in (True, False)
        assert answers_equal(answer, "x+1") in (True, False)
