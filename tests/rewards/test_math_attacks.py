"""What a reviewer tried against the math reward: what trains the wrong thing when it is accepted, and what models write
that was refused."""

import pytest

from megatron_r1.rewards.math import answers_equal, asks_percent

DIFFERENT = [
    # numbers
    (r"-2\frac13", r"-\frac23"),
    (r"-1\frac12", "-0.5"),
    (r"\frac{10^{12}}{7}", "142857142800.0"),
    (r"10^{15}\sqrt2", "1414213562000000.0"),
    ("2020-01-02", "2020-02-01"),
    ("17", r"17 \approx 18"),
    ("17", r"x = 17 \approx 18"),
    ("17", r"x \approx 17 = 18"),
    ("1:2", "0:0"),
    ("1:2:3", "0:0:0"),
    (r"\lceil\frac n2\rceil", r"\lfloor\frac n2\rfloor+1"),
    (r"\lfloor x\rfloor", r"\lceil x\rceil-1"),
    # units
    (r"5\text{ m}", r"5\text{ cm}"),
    (r"5\text{ s}", r"5\text{ ms}"),
    (r"5\text{ J}", r"5\text{ kJ}"),
    (r"5\text{ m/s}", r"5\text{ km/s}"),
    (r"5\mathrm{~m}", r"5\mathrm{~cm}"),
    (r"5\text{ cm}^2", r"5\text{ cm}^3"),
    ("5 MHz", "5 mHz"),
    ("5 miles", "5 miles per hour"),
    ("5 dollars", "5 dollars per hour"),
    ("£18", r"\$18"),
    ("¥5", "€5"),
    (r"30^\circ", "30 radians"),
    (r"5\text{ m}", "5 feet"),
    # styled letters and words
    (r"\frac{1}{2}", r"\frac{1}{2}\mathrm{x}"),
    ("4", r"4\mathrm{x}"),
    (r"2\pi", r"2\pi\mathrm{r}"),
    ("x+1", r"x+1\text{y}"),
    ("18", r"18\text{k}"),
    ("18", r"18\text{M}"),
    ("even", r"even \text{odd}"),
    ("Monday", r"Monday \text{Tuesday}"),
    # names
    ("x=1,y=2", "2,1"),
    ("a=3, b=-1", "-1, 3"),
    ("(x,y)=(1,2)", "(y,x)=(1,2)"),
    ("(1,2)", "(y,x)=(1,2)"),
    ("(1,2)", "(a,b,c)=(1,2)"),
    ("5", r"\pi x=5"),
    ("5", "ex=5"),
    (r"(\pm1,\mp2)", r"(\pm1,\pm2)"),
    # times
    ("4:30", "-4:30"),
    ("4:30", "not 4:30"),
    ("4:30", "half past 4:30"),
    ("4:30 p.m.", "before 4:30 p.m."),
    ("10:30", "10:30:30"),
    # choices
    ("A", "It is not option A"),
    ("A", "Definitely not Option A"),
    ("A", "The wrong answer is A"),
    ("A", "(A) is wrong"),
    ("A", "A. wrong"),
    ("A", "A. Rather B I think"),
    ("A", "A. 'B'"),
    ("A", r"A. \mathbf{B} is right"),
    ("A", "(A) 5, b"),
    ("C. 5", "option B: 5"),
    ("A", "A. Also possible: C and D are right"),
    # denied, hedged, changed
    ("18", "The answer is 17 but the expected answer is 18"),
    ("18", "The answer: 17; the answer: 18"),
    ("18", "17 is 18"),
    ("18", "17 equals 18"),
    ("18", "First answer: 17\nSecond answer: 18"),
    ("18", "答案是17。答案是18"),
    ("18", "17是18"),
    ("18", "It is not true that the answer is 18"),
    ("18", "It is false that the answer is 18"),
    ("18", "The answer differs from 18"),
    ("18", "Anything but 18"),
    ("18", "18 times as many"),
    ("18", "the answer is a multiple of 18"),
    ("18", "a divisor of 18"),
    ("18", "square of 18"),
    ("18", "log of 18"),
    ("18", "18 in hex"),
    ("5", "根号5"),
    ("5", "5的平方"),
    ("5", "最多5"),
    ("5", "超过5"),
    ("5", "5以内"),
    ("5", "除了5"),
    ("5", "5是错的"),
    ("5", "零下5度"),
    ("5", "亏损5元"),
]
EQUAL = [
    ("204", "There are 204 ordered triples."),
    ("204", r"There are \boxed{204} ordered triples."),
    ("18", "18 quarters"),
    ("18", "18 double rooms"),
    ("204", "Final Answer: The final answer is $204$. I hope it is correct."),
    ("x+1", "**$x+1$**"),
    ("18", "Janet makes **$18** every day."),
    ("18", "*18*"),
    ("18", '"18"'),
    ("10", "10 USD"),
    ("10", "USD 10"),
    (r"\infty", "infinity"),
    (r"-\infty", "-infinity"),
    ("x=1,y=2", "(x,y)=(1,2)"),
    ("x=1,y=2", "y=2, x=1"),
    ("(1,2)", "x = 1, y = 2"),
    ("2,3", r"x \in \{2,3\}"),
    ("(1,2)", "The point is $(1,2)$."),
    ("18", "The square root is 18."),
    (r"(-\infty,1)\cup(3,\infty)", r"(-\infty,1) U (3,\infty)"),
    (r"\mathbb{R}", "all real numbers"),
    (r"\emptyset", "No solution."),
    ("18", "The answer is 18 because 9*2=18"),
    ("6", r"The answer is $6$ since $2\cdot3=6$."),
    ("18", "Total = 18"),
    ("18", "Total cost = $18"),
    ("18", "#### 18"),
    ("18", "Ans: 18"),
    ("18", "= 18"),
    ("18", r"\therefore x = 18"),
    ("18", r"\fbox{18}"),
    ("18", r"\boxed{\large 18}"),
    ("18", "共有18种不同的方法"),
    ("18", "需要18天完成"),
    (r"-\frac32", r"-1\frac12"),
    ("-3/2", "-1 1/2"),
    (r"2\frac53", r"\frac{10}{3}"),
    (r"(\pm1,2)", "(1,2),(-1,2)"),
    (r"\lceil n/2\rceil", r"\lfloor (n+1)/2\rfloor"),
    ("(-1)^n", r"\cos(n\pi)"),
]


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_no_credit_is_given(reference, answer):
    assert not answers_equal(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_credit_is_given(reference, answer):
    assert answers_equal(reference, answer)


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("What percent of 50 is 20?", True),
        ("By what percentage did it grow?", True),
        ("How many percent are red?", True),
        ("Ann had 20% more. What is the percent increase?", True),
        ("Express it as a percentage.", True),
        ("What is the % yield?", True),
        (r"Find the price after a 10\% discount.", False),
        ("Determine x if x is 20% of 25.", False),
        ("Find 50% of 50.", False),
        ("How many students play, if 30% of 60 play?", False),
        ("How many are left?", False),
        ("", False),
        ("What is 15 percent of 60?", False),
        ("占百分之几？", True),
    ],
)
def test_only_a_question_for_a_percentage_asks_for_one(question, asks):
    assert asks_percent(question) is asks


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("5%", "5" + "%" * 500),
        (r"\pm".join("1" * 250), r"\pm".join("1" * 250) + "1"),
        ("1,2,3", r"\{" + ",".join(map(str, range(290))) + r"\}"),
        (r"\sqrt{2}", "+".join([r"\tan(\pi/2)"] * 90)),
        ("18", "答案" * 450),
        ("18", "-".join("1" * 500)),
        ("18", "is " * 600),
    ],
)
def test_long_chains_raise_nothing_and_end(reference, answer):
    assert answers_equal(reference, answer) in (True, False)
