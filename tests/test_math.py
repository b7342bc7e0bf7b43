"""math_tasks.py and workers.py: which answer a response gives, whether it is right, how it votes, and what can fail."""

import json
import random
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_code import REAL_DATA, real_data, task_of
from test_sandbox import all_end_with, linux

from verifiers import BadInput, Problem, load_task
from verifiers import math_tasks as math_task
from verifiers.math_tasks import boxed, gsm8k_answer, math_answer, verify
from verifiers.workers import Workers


def rewards_and_votes(gold, answers):
    """What `verify` says of boxed answers to one problem, as lists."""
    verdict = verify([Problem("?", gold)], [[rf"\boxed{{{answer}}}" for answer in answers]], math_answer)
    return verdict.rewards[0].tolist(), verdict.votes[0].tolist()


# --- Comparison ---
EQUAL = [
    ["1/2", "0.5", r"\frac12", r"\dfrac{1}{2}", ".5", "50/100", r"\frac{2}{4}"], ["5", "x = 5", "y = 5"],
    ["18", r"\$18", "18 dollars", r"18\text{ dollars}", "18.0", "x = 18", r"18\%", "18 percent", r"18^\circ"],
    ["C", "(C)", r"\text{(C)}", r"\textbf{C}"], ["1000", "1,000", "1{,}000", "1000.0", "10^3"],
    ["1/3", "0.3333333", "0.333333", r"\frac{1}{3}"], ["Evelyn", r"\text{Evelyn}", "evelyn"],
    [r"2\sqrt{2}", r"\sqrt{8}", "2.828427"], ["(x+1)^2", "x^2+2x+1"], [r"\{1,2\}", "2, 1"],
    ["(1, 2)", r"(1, \frac42)"], ["x < 3", "3 > x"], [r"\text{no solution}", "no solution"],
    *([other] for other in ("12:00", "12:30", "0", "0.0000001", "0.0000002", "(2, 1)", r"\infty", r"-\infty", "0.333")),
]  # fmt: skip
ANSWERS = [form for forms in EQUAL for form in forms]


def test_equal_answers_are_right_and_vote_together_where_they_are_wrong():
    for forms in EQUAL:
        assert rewards_and_votes(forms[0], forms)[0] == [1.0] * len(forms)
    assert rewards_and_votes("777", ANSWERS)[1] == [ANSWERS.index(forms[0]) for forms in EQUAL for _ in forms]


@pytest.mark.parametrize("gold", ["1/2", "x = 5", "5", r"\{1,2\}", "777"])
def test_votes_do_not_depend_on_order_or_company_and_decide_the_reward(gold):
    answers = [*ANSWERS, ""]
    rewards, votes = rewards_and_votes(gold, answers)
    assert all(x == y for x, v in zip(rewards, votes) for y, w in zip(rewards, votes) if v == w)
    for count in (8, 8, len(answers), len(answers)):
        some = random.Random(count).sample(range(len(answers)), count)
        found = rewards_and_votes(gold, [answers[i] for i in some])
        assert found[0] == [rewards[i] for i in some]
        together = [[v == w >= 0 for v in found[1]] for w in found[1]]
        assert together == [[votes[i] == votes[j] >= 0 for i in some] for j in some]


# gold answer, right responses, wrong ones, the prompt where it matters
BOXED = [
    ("1234567", [r"1\,{,}234{,}567", r"1,\,234,\,567", r"1\ 234\ 567", r"1{\,}234{\,}567"], []),
    ("32348", [r"32,\! 348", r"32,\!348"], []), ("10901", [r"10\,901", "10~901", "10 901"], []),
    ("12345.5", [r"12\,345.5"], []), ("12345", [r"\$12{,}345"], []), ("32349", [], ["32, 349"]),
    ("(100,200)", [r"(100,\,200)"], []), ("1,2", [r"1,\,2"], []), ("12,345", ["12,345"], ["12, 345"]),
    ("12, 345", ["12,345", "345, 12"], []), ("5 6", ["5 6"], []), ("19", [], [r"10\;9"]),
    (r"(-\infty,-2)\cup(2,\infty)", ["|x|>2", r"x<-2 \text{ or } x>2", r"x<-2 \lor x>2", r"x<-2,\ x>2"],
     [r"x<-2 \text{ and } x>3", "x<-2, y>2"]),
    (r"(-\infty,3)", ["x<3", r"x \in (-\infty,3)"], [r"x\le 3", r"x \in (-\infty,3]"]),
    (r"(-\infty,3]", [r"x\le 3"], []), ("x<3", [r"(-\infty,3)"], []), (r"\le 3", [r"\leq 3"], []),
    ("[2,5)", [r"2\le x<5", r"x\ge2 \text{ and } x<5"], [r"2\le x\le5", r"x\ge2 \text{ or } x<5"]),
    ("5", ["5m", "5 cm", "5cm", r"5\text{ cm}^2", "5 cm^2", "x=5", "5=x", "5 km/h", r"5 \text{ square cm}", "|AB| = 5"],
     ["5abc", "5t", "18 dollars", "x^2+y^2=5", "5 million", r"5\text{ dollars and }30\text{ cents}",
      r"5\text{ ft }2\text{ in}"]),
    ("5", [], ["5m"], "Let $m$ be an integer. How large is it?"), ("5", ["a^2+b^2=5"], [], "What is $a^2 + b^2$?"),
    ("3", [r"\log_2 8", "3rd"], [r"\log_2 9", "3 8", "x<3", r"\ge 3", "3pqr"]), ("3pqr", [], ["3"]),
    (r"2\pi r h", [r"2\pi r h"], [r"2\pi r"]), (r"12.5\%", ["12.5", "0.125"], [r"0.125\%", "1.25"]),
    ("12.5", [r"12.5\%"], []), ("0.125", [r"12.5\%"], []), (r"0.\overline{27}", [r"\frac{3}{11}"], ["0"]),
    (r"\frac16", ["0.1666...", r"0.1\overline{6}", r"0.1\bar6"], []), (r"\frac13", ["0.(3)"], []),
    (r"0.\overline{3}", [], ["0.3"]), (r"\frac{1}{7}", [r"0.\dot{1}4285\dot{7}"], []),
    (r"x+\frac13", [r"x+0.\overline{3}"], []), ("1", ["0.999...", r"0.\dot{9}"], ["2 1/2"]),
    ("2516_8", ["2516", "2516_{8}", "(2516)_8"], ["2516_9", r"2516_{\text{9}}"]), ("2516", ["2516_8"], []),
    ("A_1", [], ["A_2"]), (r"1.6\times10^{-19}", ["1.6e-19"], ["0", r"3.2\times10^{-19}"]), ("1000", ["1e3"], []),
    ("2^{-30}", [r"\frac{1}{1073741824}", r"\frac{1}{2^{30}}"], ["0.0", "0"]), ("0", ["0.0"], ["2^{-30}"]),
    ("1024", ["2^{10}=1024"], []), ("11", ["2x + z = 11"], ["5 6"]), ("2x + z = 11", [], ["11"]),
    (r"1\pm\sqrt2", [r"\frac{2\pm\sqrt8}{2}", r"1+\sqrt2, 1-\sqrt2"], [r"1+\sqrt2"]), ("x^2", ["x²"], ["2x"]),
    ("-2", ["\N{EN DASH}2"], []), (r"\infty", ["∞"], []), ("0.001", ["10^-3", "10⁻³"], []),
    (r"\ln 2", [r"\log_e 2"], []), (r"\emptyset", [r"\varnothing"], []), ("-2.5", [r"-2\frac12"], []),
    ("2.5", ["2 1/2", r"2\frac12", "2\xbd"], []), (r"\frac12", ["\xbd"], ["1:2"]), ("C", [], ["(B) 12", "(D)"]),
    ("B", [r"\textbf{(B)}\ 12", "B. 12", "B)", r"\text{Option B}"], ["(B) or (C)"]),
    ("12", [r"\textbf{(B)}\ 12", r"(\text{B})\ 12", "approximately 12", r"\text{about } 12", "≈12"],
     ["approximately 13", "<12, 12>"]),
    ("5000", ["5000", r"500 \cdot 10"], ["255^2 - 245^2", "255^{2}-245^{2}", "(255^2-245^2)"],
     "What is the value of $255^2 - 245^2$?"),
    ("10", [], [r"\binom{5}{2}"], r"Compute $\dbinom{5}{2}$."), ("12", [], [r"3\cdot4"], r"Compute $3 \times 4$."),
    ("4", [], [r"\log_{2}16"], r"Evaluate $\log_2 16$."), ("x^2+10x+25", [], ["(x+5)^2"], "Expand $(x+5)^2$."),
    (r"\frac{\sqrt2}{2}", [r"\frac{1}{\sqrt2}"], [], r"If $\cos x = \frac{1}{\sqrt2}$, find $\sin x$."),
    ("x+1", ["1+x"], [], "Simplify $1+x$."), (r"\frac12", ["1/2"], [], "Find $1/2$."),
    ("0.5", ["1/2"], [], "How large is $x^{1/2}$?"), ("0.5", [], ["1/2"], "Write $1/2$ as a decimal."),
    (r"\frac{4}{11}", [], [r"\frac{8}{22}"], r"Simplify $\frac{8}{22}$."),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [
     r"\begin{pmatrix}1\\[0.5em]2\end{pmatrix}", r"\begin{pmatrix}1\\*[4pt]2\end{pmatrix}",
     r"\begin{pmatrix}1\\[\smallskipamount]2\end{pmatrix}", r"\begin{pmatrix}1\cr 2\end{pmatrix}"],
     [r"\begin{pmatrix}1\\ [4pt] 3\end{pmatrix}"]),
    (r"144\mbox{ m}^3", [r"144\text{ m}^3", "144", "144 m^3"], ["144 cm^2"]), ("5 cm^2", ["5 cm^{2}"], ["5 cm^3"]),
    ("4 + 2i", ["4+2i"], []), ("2i", ["2i"], ["2"]), ("5n", ["5n", r"n\cdot 5"], ["5"]), ("0.5", ["1.5/3"], []),
    ("5 million", ["5000000"], []), ("5{,}000{,}000", ["5 million"], []), ("1:2", ["1:2", "2 : 4"], ["2:3"]),
    (r"\frac12", ["1:2", "2 : 4"], ["1:3"], "What is the ratio of $a$ to $b$?"), ("20", ["<20>"], ["<20", "<2>0"]),
    (r"\frac{14}{3}", [  # fonts, sizes, colours, distances and delimiters are no part of an answer
        form.replace("X", r"\frac{14}{3}") for form in (
            r"\mathbf{X}", r"\boldsymbol{X}", r"\bm{X}", r"{\bf X}", r"\textbf{X}", r"\color{red}{X}", r"\underline{X}",
            r"\textcolor{blue}{X}", r"\large X", "{{X}}", r"\[X\]", r"\(X\)", r"X \qquad", r"\quad X", r"\phantom{0}X",
            r"\hspace{1cm}X", r"\begin{aligned}X\end{aligned}", r"\text{The answer is }X", r"\text{Area: }X",
        )], [r"\mathbf{\frac{14}{5}}", r"\mathbf{-}\frac{14}{3}"]),
    ("3,4", [r"3 \text{ or } 4", r"3\text{ and }4"], []), (r"3 \text{ or } 4", ["4,3"], []),
    (r"28\%", [r"\frac{7\cdot 4}{100}"], [r"\frac{7\cdot 5}{100}"]),
    ("(1,2)", [r"\langle 1,2\rangle", "(x,y) = (1,2)", "x = 1, y = 2"], [r"\langle 2,1\rangle", "(x,y) = (2,1)"]),
    ("2", [r"x^2=4 \implies x=2", r"N \equiv 2 \pmod 7", "2 (mod 7)", r"2 \pmod{7}"],
     [r"N \equiv 5 \pmod 2", r"\log_e 2", ""]),
    (r"2 \pmod 7", ["2 (mod 7)", "2"], ["2 (mod 5)"]), ("(6,-1)", [r"\bigl(6,-1\bigr)", r"\Big(6,-1\Big)"], []),
    (r"\frac{1}{3600}", [r"\frac{1}{60^2}"], [r"\frac{1}{3601}", r"\frac{1}{60^2+1}", "0.00028"]),
    # thousands in a formula, labels, units of several numbers, number words
    ("1200", ["x = 1,200", r"300 \cdot 4 = 1{,}200", r"A=1,200\text{ cm}^2", "1'200", r"1200\text{ in²}"], []),
    (r"1200\pi", [r"1,200\pi", "1200 pi"], []), ("1234567890x", ["1,234,567,890x"], []),
    ("1000,2000", ["1,000, 2,000", r"1,000\text{, and }2,000"], []),
    ("5", [r"\text{Speed} = 5\text{ mph}", "f^{-1}(2)=5", r"\lim_{x\to 0} f(x)=5", r"5\text{ when }x=2", r"5{\rm cm}",
           r"5^\circ F", r"\text{only }5", "5 m^2", r"5\,\mathit{cm}", r"5 \blacksquare"],
     [r"5\text{ red}, 3\text{ blue}", r"5\text{ cm}\times 3\text{ cm}", r"5\text{ tenths}", "5 squared",
      r"2\text{ when }x=5", r"\text{not }5"]), ("2500000", ["2.5 Million", "25 lakh"], ["2.5"]),
    # intervals, sets, complex numbers, degrees
    (r"(-\infty,2)", [r"\{x \mid x<2\}", r"\left\{x \in \mathbb{R} : x<2\right\}", r"x<2, x\in\mathbb{R}",
                     r"]-\infty,2)"], [r"\{x \mid x>2\}"]),
    (r"(-\infty,-2]\cup[3,\infty)", [r"(-\infty,-2]\text{ or }[3,\infty)"], []), ("(3,-2)", [r"\{(3,-2)\}"], []),
    (r"(-\infty,\infty)", [r"\text{all real numbers}", r"-\infty<x<\infty"], []), (r"\emptyset", [r"\{ \}"], []),
    ("2+3i", [r"2+3\cdot i", r"2+i\cdot 3"], ["2-3i"]), ("-1", ["i^2", r"e^{i\pi}"], ["i"]),
    (r"\frac12", [r"\cos 60^\circ", r"\sin(30^\circ)"], [r"\cos 60"]), ("90^\\circ", ["90^o"], []),
    # degenerate LaTeX
    (r"\frac{\pi}{3}", [r"\frac\pi3", r"\dfrac\pi{3}"], []), (r"\sqrt[3]{2}", [r"\sqrt[3]2"], []),
    ("120", ["5!=120"], []),
    (r"\ln 2", [r"\operatorname{ln} 2", r"\text{ln}2", "ln(2)"], []), ("252", [r"{10 \choose 5}"], []),
    ("2\\sqrt3", ["2*sqrt(3)", r"2\sqrt3\ (\approx 3.464)", r"2\sqrt3\text{ or about }3.46"], []),
    ("x^2", ["x**2"], []), ("52_8", ["52 (base 8)", r"52\text{ base }8"], [r"52\text{ in base 9}"]),
    ("x+1", [r"x+1,\ x\neq1", r"x+1 \quad (x \neq 1)"], []),
    ("5ab", [], ["5AB"]), (r"\text{ellipse}", [r"\text{an ellipse}"], []),
    ("3:4", [r"3\colon 4", r"3\text{ to }4", "3{:}4"], []),
    # choices, order, echoes in another writing
    ("B", ["B (12)", r"\text{B: }12", r"\text{The answer is B}", r"\text{B}\quad 12"],
     ["A=B", r"\text{B or C}", "AB", r"B \ne"]),
    (r"\frac13,\frac12", [r"\frac13<\frac12"], [r"\frac12,\frac13"], "List them from least to greatest."),
    ("5000", [], ["(255)^2-(245)^2", "-245^2+255^2", "255^2-245^2=255^2-245^2"], "Compute $255^2-245^2$."),
    ("x^2-x-2", [], [r"(x-2)(x+1)", r"(x+1)\cdot(x-2)"], "Expand $(x+1)(x-2)$."),
]  # fmt: skip


def misjudged(cases, answer_in):
    """Those of some cases (gold answer, response, expected reward, the prompt where it matters) judged otherwise."""
    problems = [Problem(*prompt or ["How much is it?"], gold) for gold, _, _, *prompt in cases]
    verdict = verify(problems, [[response] for _, response, *_ in cases], answer_in)
    assert verdict.counts == {}
    return [case for case, reward in zip(cases, verdict.rewards) if reward != case[2]]


def test_verdicts_of_reported_kinds():
    cases = [
        (gold, rf"\boxed{{{answer}}}", expected, *prompt)
        for gold, right, wrong, *prompt in BOXED
        for answers, expected in ((right, 1), (wrong, 0))
        for answer in answers
    ]
    assert misjudged(cases, math_answer) == [] and len(cases) > 100
    of_gsm8k = [("2", "#### 2 dozen", 1, "How many dozen eggs?"), ("6", r"\boxed{5 \to 6}", 0)]
    assert misjudged(of_gsm8k, gsm8k_answer) == []


# --- The answer in a response ---
MATH = [  # the answer, and responses that give it
    ("12", [
        r"so \boxed{12}.", r"\boxed{1}, no: \boxed{12}", r"\boxed{\boxed{12}}", r"\fbox{12}", r"\boxed 12$",
        r"\boxed{12} then cut off \boxed{5", r"\boxed{} and the answer is 12", r"}}}{ \boxed{12}",
        r"\boxed{12} is put in \boxed form", "\\boxed{12}\n\nQuestion: 1+1?\nAnswer: \\boxed{2}",
        "#### 12\nThe answer is 11", "The answer is 12. Then 7.", "**Answer:** 12", "Answer:\n$$\n12\n$$",
        "Thus the value of $x$ is 12.", "Final Answer: The volume of $ABCD$ is 12. I hope it is correct.",
        "Final Answer: There are 12 ways.", "The final answer is: It takes 12 minutes.", "The answer is therefore 12.",
        "The answer is 12, since 3 * 4 = 12.", "The answer is 12 because 5 of them left.", "<answer>12</answer> of 20",
        "The answer is x = 12 which is even.", "The answer is `12`.", "The answer is 12 for all n.",
        "The answer is indeed 12.", "The answer is 12 (twelve).", "The answer is equal to 12.",
        "The answer is 12 out of 20.", "The answer is not 13 but 12.",
        "\\boxed{12}\n\nHuman: 1+1?\nAssistant: \\boxed{2}",
        "#### 2. Multiply\nThus\n\\boxed{12}", "The answer is 12 when n = 3.",
    ]),
    (r"\frac12", [r"The answer is $\frac12$. I hope it is correct.", r"This makes \frac{1}{2}",
                  "<answer>\n\\frac12\n</answer>", r"<answer>\(\frac12\)</answer> and 3"]),
    (r"\frac{1}{\sqrt{2}}", [r"\boxed{\frac{1}{\sqrt{2}}}"]), (r"\{1, 2\}", [r"\boxed{\{1, 2\}}"]),
    ("y = 3", [r"Thus \(x = 2\) and \[y = 3\]", r"$x=\boxed{1}$ so $y=\boxed{3}$"]),
    ("1,2", ["The answers are 1 and 2.", "So the roots are 1 and 2.", "Hence **x = 1** or **x = 2**.",
             "The solutions are $x=1$ and $x=2$.", r"$x=\boxed{1}$ and $x=\boxed{2}$",
             r"\boxed{1} or \boxed{2}", r"\boxed{1},\ \boxed{2}", r"\boxed{1}; \boxed{2}",
             "The solutions are $1$ or $2$.", "The answers are $x=1$, $x=2$.",
             r"\boxed{1} \quad \text{and} \quad \boxed{2}"]),
    ("1,2,3", ["The answer is $1$, $2$, and $3$.", r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$"]),
    ("B", ["The answer is (B).", "The answer is B because 3 * 4 = 12.", "Answer: B - 12", "The answer is clearly B.",
             "The answer is (B) 12", "The answer is option B."]),
    ("12000000", ["The answer: There are 12 million ways."]),
    ("4", ["We have $a=3$ and $b=4$."]), ("5", ["The roots are $2$ and $3$, so the sum is $5$."]),
]  # fmt: skip
GSM8K = [
    ("42", ["6 * 7 = 42\n#### 42", "#### 6 * 7 = 42 (checked: 42 / 7 = 6)", "#### She has 3 boxes of 14, that is 42",
            "#### 42 = 6 * 7", "#### 42 apples, not 43", "#### 42 [6 x 7]",
            "#### 42\n\nQuestion: 1+1?\nAnswer:\n#### 2", "#### 42\n\nQ: 1+1?\nA: #### 2", "#### 42 out of 50",
            "#### Step 2: Multiply\n6 * 7 = 42\n\\boxed{42}", "#### 42 (6 × 7)", "#### 42 miles in 3 hours",
            "#### 42; 6 * 7", r"#### The cost is \(\$42\).", "#### USD42"]),
    ("0.42", ["#### 42%"]), ("-42", ["#### minus 42"]),
    ("5", ["#### 5, which is 3 more", "#### none. The answer is 5.", "#### 5 because 3 of them left", "#### _5_",
           "#### The amount for each person is 5", "#### The number which remains is 5", "#### 5 for each of the 3"]),
    ("2.5", ["#### 2 1/2", "#### 2\xbd cups", "#### 2 and 1/2", "#### 2 and a half"]), ("1500", ["#### 1.5k"]),
    ("1500000", [r"\boxed{1.5\text{ million}}", "#### $1.5 million dollars"]), ("1234.5", ["#### $1,234.50"]),
    ("1000000", ["#### 1 000 000", "#### $1M"]), ("4200", [r"\boxed{4\,200}", "#### 4\u202f200"]),
    ("1234", [r"\[ 1000 + 234 = 1\,234 \]", "The total is 1{,}234 dollars"]), ("9500", [r"\$9{,}500"]),
    ("0.5", ["#### \xbd", "#### 1/2", r"\boxed{\frac{1}{2}} of 20"]), ("300", ["#### 3 hundred"]),
    ("1000", ["#### 1e3", "#### 1 × 10³"]), ("24", ["#### 2 dozen", "#### 24, i.e. 2 dozen"]),
    ("18", ["#### 18 m^2", "#### $18.00 per day", "The answer is 18 dollars for 2 days."]), ("10", ["#### 10:00 AM"]),
    ("12", ["#### 12 is the sum", "#### 4 * 3 = $12"]), ("20", ["#### <20>", "The answer is <$20>"]),
    ("8", ["#### 2^3"]), ("0.001", ["#### 10^{-3}"]), ("9", ["#### 3 x 3 = 9"]), ("50", ["#### 50%"]),
    ("25", ["#### 10 * 2 = 20 + 5 = 25"]), ("3", ["#### 3/1", "It takes 10-3 days"]),
    ("-3", ["#### -3", "#### - 3", "The answer is -$3 now", "The answer is \N{MINUS SIGN}3"]),
]  # fmt: skip
NO_ANSWER = {
    math_answer: ["no idea", "", "The answer isn't $12$.", "The answer cannot be 12.",
                  r"\boxed{1}" + " hm" * 5000, r"\boxed{" + "9" * 1001 + "}"],
    gsm8k_answer: ["no idea", "x2 and y3", "9" * 10**6, "#### 5, 6, 7", "#### 5-6", "#### between 5 and 6",
                   "#### 5 or 6", "#### 5 to 6", "#### 5 (maybe 6)", "#### 5 squared", "#### under 5", "#### 5 + 6",
                   "#### 5 apples and 6 pears", "#### 5 (or 6)",
                   "#### x > 5", "#### not 5", "#### less than 5",
                   "#### 10 - 3", "#### 4 * 3", "#### 2 hours 30 minutes", r"\boxed{42 or 43}",
                   "The answer is obtained by adding 5 and 6. So 11"],
}  # fmt: skip


@pytest.mark.parametrize("answer_in, rows", [(math_answer, MATH), (gsm8k_answer, GSM8K)], ids=["math", "gsm8k"])
def test_the_answer_of_a_response(answer_in, rows):
    assert misjudged([(gold, response, 1) for gold, responses in rows for response in responses], answer_in) == []
    assert [answer for answer in map(answer_in, NO_ANSWER[answer_in]) if answer is not None] == []


def test_an_echo_and_other_formulas_of_equal_value_vote_apart_from_the_gold_answer():
    problem, answers = Problem("What is $14.6+2.15$?", "16.75"), ["16.75", "14.6+2.15", "14.6 + 2.15", "67/4", "17"]
    verdict = verify([problem], [[rf"\boxed{{{answer}}}" for answer in answers]], math_answer)
    assert verdict.rewards.tolist() == [[1, 0, 0, 1, 0]] and verdict.votes[0, [0, 1, 3, 4]].tolist() == [0, 1, 0, 4]


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(NUMBERS, NUMBERS)
def test_plain_numbers_are_judged_as_math_verify_judges_them(gold, answer):
    for pair in [(gold, answer), (gold, gold)]:
        fast, _ = math_task.without_algebra(*pair)
        (((slow, form), failure),) = math_task.CHECKERS.map([pair])
        assert failure is None and fast == slow
        assert math_task.plain_key(pair[1]) == form  # so 0.5 votes with \frac12


# --- Workers ---
SLOW = "10^{10^{10}}"


@pytest.fixture
def impatient(monkeypatch):
    """Workers that give a check one second of CPU time, however long that takes."""
    monkeypatch.setattr("verifiers.workers.CROWD", 200)
    workers = Workers("math", limit_s=1.0, count=2)
    monkeypatch.setattr(math_task, "CHECKERS", workers)
    math_task.checked.clear()
    yield workers
    workers.close()


def test_timeouts_are_counted_cost_only_themselves_and_are_kept(impatient, monkeypatch):
    row = [rf"\boxed{{{answer}}}" for answer in [SLOW, r"\sqrt{9}", SLOW, r"\sqrt{16}", "(10^{9})!"]]
    for kept in (False, False, True):  # the second time the workers are new ones, the third there are none
        if kept:
            monkeypatch.setattr(impatient, "map", lambda jobs: [] if not jobs else pytest.fail(f"asked again: {jobs}"))
        else:
            math_task.checked.clear()
        verdict = verify([Problem("?", "3")], [row], math_answer)
        assert verdict.rewards.tolist() == [[0, 1, 0, 0, 0]] and verdict.votes.tolist() == [[-1, 1, -1, 3, -1]]
        assert verdict.counts == {"timeouts": 3}
    math_task.checked.clear()


def test_what_the_machine_had_no_time_for_is_asked_again(impatient):
    """A worker that is stopped uses no CPU time: its answer is late, and no verdict is kept of it."""
    impatient.map([["1", r"\sqrt{2}"]])
    impatient.children[0].send_signal(signal.SIGSTOP)
    for limit, counts, votes, rewards in ((0.01, {"late": 1}, [[-1]], [[0]]), (60.0, {}, [[0]], [[1]])):
        impatient.limit_s = limit  # the shorter one of the parent's patience alone
        verdict = verify([Problem("?", "3")], [[r"\boxed{\sqrt{9}}"]], math_answer)
        assert (verdict.counts, verdict.votes.tolist(), verdict.rewards.tolist()) == (counts, votes, rewards)


def test_an_interrupted_call_ends_its_workers_at_once(impatient):
    impatient.limit_s = 60.0
    impatient.map([["3", r"\sqrt{9}"]])
    (child,) = impatient.children
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        impatient.map([["1", SLOW]])
    signal.signal(signal.SIGALRM, before)
    assert child.returncode == -signal.SIGKILL and impatient.children == []
    assert impatient.map([["3", r"\sqrt{9}"]])[0][1] is None


def test_results_do_not_depend_on_the_number_of_workers_or_the_thread():
    pairs, found = [["777", math_task.clean(form)] for form in ANSWERS], {}
    for count in (1, 3):
        workers = Workers("math", count=count)
        thread = threading.Thread(target=lambda: found.__setitem__(count, workers.map(pairs)))
        thread.start()
        thread.join()
        assert len(workers.children) == count
        workers.close()
    assert found[1] == found[3] and not any(failure for _, failure in found[1])


def test_no_process_outlives_close_and_idle_ones_that_ended_are_replaced(impatient):
    impatient.map([["1", "x"]] * 2)
    processes = [*impatient.children]
    [process.terminate() for process in processes]  # a signal to the whole group is the parent's to answer
    impatient.close()
    assert len(processes) == 2 and all(process.returncode not in (None, -signal.SIGTERM) for process in processes)
    for _ in range(2):
        (((right, _), failure),) = impatient.map([["x", "x"]])
        assert right and failure is None
        impatient.children[0].kill(), impatient.children[0].wait()


def test_a_child_that_cannot_start_is_an_error_not_a_zero(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="did not start"):
        Workers("nothing of this name").map([[]])
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start: ImportError: half installed"):
        Workers("math").map([["1", "x"]])


PARENT = """
from verifiers.workers import Workers
workers = Workers("math", limit_s=2.0, count=2)
workers.map([["1", "x"]] * 2)
print(*[child.pid for child in workers.children], flush=True)
"""


@linux
@pytest.mark.parametrize("then", [f"workers.map([['1', {SLOW!r}]] * 2)", "input()"], ids=["stuck", "idle"])
def test_workers_die_with_the_parent(then):
    assert all_end_with(PARENT + then)


# --- Data ---
WORKED = "2*2=<<2*2=4>>4\n#### 1,004"
ROWS = [  # a row, and its problem
    ({"problem": "a", "answer": "1"}, ["a", "1"]),
    ({"question": "b", "answer": 2, "level": "Level 5"}, ["b", "2", "", 5]),
    ({"problem": "c", "solution": r"so \boxed{\frac12}", "level": "Level ?"}, ["c", r"\frac12", r"so \boxed{\frac12}"]),
    ({"question": "d", "answer": WORKED, "level": 3}, ["d", "1,004", "2*2=4\n#### 1,004", 3]),
    ({"problem": "e", "answer": "$x$", "solution": "s", "level": None}, ["e", "x", "s"]),
    ({"problem": None, "question": "f", "answer": "6"}, ["f", "6"]),
    *(({"problem": "g", "answer": "7", "level": x}, ["g", "7", "", y]) for x, y in (("5", 5), (5.0, 5), ("", None))),
]  # fmt: skip


def test_each_schema_gives_its_problem(tmp_path, capsys):
    rows, expected = zip(*ROWS)
    assert task_of(tmp_path, "math", *rows).test == [Problem(*fields) for fields in expected]
    told = f"{tmp_path}, train: 2 levels that are no number, such as 'Level ?': these problems have no level"
    assert capsys.readouterr().err.splitlines() == [told, told.replace("train", "test")]
    assert task_of(tmp_path, "gsm8k", rows[3]).test == [Problem("d", "1004", "2*2=4\n#### 1,004", 3)]
    mine = [{"problem": "a", "answer": answer} for answer in ("$18", "18 dollars", "25\\%", "-1/2")]
    assert [problem.answer for problem in task_of(tmp_path, "gsm8k", *mine).test] == ["18", "18", "25", "-1/2"]


@pytest.mark.parametrize("row, task, message", [
    ({"problem": "a", "answer": ""}, "math", "train row 2: empty answer"),
    ({"problem": "a", "solution": "no box"}, "math", "train row 2: empty answer"),
    ({"problem": " ", "answer": "1"}, "math", "train row 2: empty problem"),
    ({"problem": "a", "result": "1"}, "math", "row 2: no column answer or solution; found problem, result"),
    ({"problem": "a", "answer": "x + 1"}, "gsm8k", "row 2: the answer 'x .* is not a number; --task math"),
    ({"problem": "a", "answer": "(C)"}, "gsm8k", "row 2: the answer '.C.' is not a number"),
    ({"problem": "a", "answer": "1" * 2000}, "math", "row 2: an answer of 2000 characters"),
    ({"problem": {"text": "a"}, "answer": "1"}, "math", "train row 2: problem is a dict"),
    ({"problem": "\ud800", "answer": "1"}, "math", "train row 2: half a character"),
    ({"a\nb": 1}, "math", "row 2: no column problem or question, answer or solution; found a b"),
])  # fmt: skip
def test_a_bad_row_is_told_in_one_line(tmp_path, row, task, message):
    with pytest.raises(BadInput, match=message) as error:
        task_of(tmp_path, task, {"problem": "a", "answer": "1"}, row)
    assert "\n" not in str(error.value)


def test_splits_that_are_missing(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"problem": "a", "answer": "1"}\n')
    task = load_task("math", str(tmp_path))
    assert len(task.train) == 1 and task.test == []
    with pytest.raises(BadInput, match="has no test split"):
        load_task("math500", str(tmp_path))
    (tmp_path / "train.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(BadInput, match="has no train or test split"):
        load_task("math", str(tmp_path))


@pytest.mark.parametrize("library, task, data", [
    ("math-verify", "gsm8k", "anywhere"), ("reasoning-gym", "reasoning_gym/leg_counting", None),
])  # fmt: skip
def test_without_the_library_the_line_says_how_to_install_it(monkeypatch, library, task, data):
    monkeypatch.setattr(math_task.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=f"pip install {library}=="):
        load_task(task, data)


@pytest.mark.parametrize("task, golds", [("gsm8k", "22 9 40".split()), ("math", ["7", r"\frac{1}{4}", "a^2 - a - 6"])])
def test_the_template_shows_answers_that_the_task_can_read(tmp_path, task, golds):
    task = task_of(tmp_path, task, {"problem": "a", "answer": "1"})
    shots = task.template.split("\n\n")
    assert shots[-1] == "Question: {prompt}\nAnswer:" and len(shots) == 4
    for shot, gold in zip(shots, golds):
        assert task.verify([Problem("?", gold)], [[shot.partition("Answer:")[2] + "\n\n" + shots[0]]]).rewards == 1


# --- Real data ---
@real_data
@pytest.mark.parametrize("task, split, count", [
    ("gsm8k", "train", 1000), ("gsm8k", "test", 300), ("math", "train", 600), ("math500", "test", 200),
])  # fmt: skip
def test_gold_solutions_are_right(task, split, count):
    """By the whole path, and, for MATH, by math-verify alone, which has no short cut for equal texts."""
    task = load_task(task, f"{REAL_DATA}/{task}")
    golds = getattr(task, split)
    verdict = task.verify(golds, [[problem.solution] for problem in golds])
    assert len(golds) == count and verdict.counts == {}
    assert [problem.answer for problem, reward in zip(golds, verdict.rewards) if not reward] == []
    if task.name != "gsm8k":
        assert {problem.level for problem in golds} == {1, 2, 3, 4, 5}
        found = math_task.CHECKERS.map([[problem.answer, math_answer(problem.solution)] for problem in golds])
        assert [problem.answer for problem, (result, _) in zip(golds, found) if not (result and result[0])] == []


# rows of graders/pairs.jsonl that we judge otherwise than math-verify's own tests do, all of them refusals
DISAGREEMENTS = {
    **dict.fromkeys((47, 144, 146, 151), "decimal comma: to us a comma separates"),
    **dict.fromkeys((51, 68), "gold or answer in two boxes with words between them"),
    **dict.fromkeys((79, 138), "equal to 2 decimals, and we ask for 6"),
}


@real_data
def test_agreement_with_the_tests_of_math_verify():
    rows = [json.loads(line) for line in Path(REAL_DATA, "graders", "pairs.jsonl").open()]
    golds = [Problem("?", boxed(row["gold"]) or row["gold"]) for row in rows]
    verdict = verify(golds, [[row["pred"]] for row in rows], math_answer)
    judged_otherwise = {i for i, row in enumerate(rows) if int(verdict.rewards[i, 0]) != row["expected"]}
    assert len(rows) == 161 and judged_otherwise == set(DISAGREEMENTS) and verdict.counts == {}
    assert all(rows[i]["expected"] == 1 for i in judged_otherwise)
