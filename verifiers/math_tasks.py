"""Tasks `gsm8k`, `math` and `math500`: mathematics with a final answer, compared by the `math-verify` library.

Data (`--data PATH` gives any task local files instead, see rows.py):
  gsm8k    openai/gsm8k, configuration main: 7473 train / 1319 test; the answer follows "####".
  math     nlile/hendrycks-MATH-benchmark: the 12 000 train / 500 test split of Hendrycks MATH by Lightman et al. 2023
           (arXiv 2305.20050) that Chow et al. use, with levels 1-5; its test side is MATH-500.
  math500  HuggingFaceH4/MATH-500: those 500 problems, for evaluation only.
Your own problems: columns `problem` (or `question`), `answer`, optionally `solution` and `level` ("Level 5", "5", 5).
`answer` may be a GSM8K solution that ends in "#### N"; without it, the last \\boxed{} of `solution` is the answer.

The answer in a response. A response ends at a "Question:" of its own, and behind an answer at "Problem:", "Human:" and
their like. Of its last 10 000 characters, the first rule that finds something decides ("the answer is not 5" is none):
  math     the last \\boxed{}; what follows the last "####"; what follows the last "answer is" or "answer:"; the last
           $...$ or number, whichever ends later
  gsm8k    "####", \\boxed{}, "answer is", in this order, where they hold a number; the last number. One that holds
           several numbers and is no equation is no answer (see `number_in`)
An answer of more than 1000 characters is none. No answer has reward 0 and no vote.

Rewards and votes. An answer equal to the gold one has reward 1, and all such share a vote. Any other has reward 0 and
votes for its canonical form (workers.canonical): numbers by value to 6 decimals, expressions by value at a fixed point,
sets by their elements. Pairwise comparison would be no partition: to math-verify 5 equals "x = 5" and "y = 5". What
needs more than 5 s of CPU time or kills its worker (workers.py) has reward 0, no vote, and a count in the verdict.

Decided, where math-verify or its users differ:
  several boxes       the last one counts; with commas, "and", "or" between, a list
  "$18", "18 dollars" equal: currency signs, and words after a number, are units, and units are not compared
  "(C)" and "C"       equal: a single capital letter, in brackets or not, is a choice; "(C) 12" is either of its parts;
                      "C or D" is no choice
  1/3 and 0.3333333   equal: decimals count to 6 places, 0.333 is not 1/3; below 1, 6 digits count
  28%, 28 and 0.28    28% equals the others, whichever is gold
  5x, 5ab, 5 cm       letters glued to a number, or one or two behind it, are variables, unless they are a known
                      unit and no variables of the prompt; a word is a unit
  121_3 and 121_4     different, as are m^2 and m^3; a base or an exponent of a unit may be left out
  x < 3 and (-oo, 3)  equal, as sets; several inequalities are a union with "or" or where they exclude each other
  10\\,901, 2 1/2     a number with its thousands apart, a mixed number; "5 6" is no number, and "12, 345" two; "5 red,
                      3 blue" is no 5, nor are "5 squared" and "5 tenths"
  i, \\cos 60^\\circ   the imaginary unit; degrees inside of a function
  \\text{Area} = 5    the right side, unless the gold answer is an equation; a condition behind an answer is dropped
  1:2 and 1/2         different, unless the prompt asks for a ratio or the gold answer is one
  \\mathbf{5}, 5 (mod 7) equal to 5: fonts, sizes, colours, delimiters and a modulus are dropped
  255^2 - 245^2       worth 0 where the prompt asks for it, or has it and the gold answer is simpler (`is_echo`)
  x = 5 and 5         equal when either is gold; x^2 + y^2 = 5 is a curve, and no 5
Left as they are: digits of other scripts and the sign for roots (½ is 1/2), a.m. against p.m., and a box
inside <think> where none follows.
"""

import collections
import functools
import importlib.util
import itertools
import math
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch

from . import BadInput, Problem, Task, Verdict, votes_from_answers
from .rows import load_rows, require_columns
from .workers import Workers, number_key

SOURCES = {  # task -> hub id, configuration
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("nlile/hendrycks-MATH-benchmark", None),
    "math500": ("HuggingFaceH4/MATH-500", None),
}
MAX_ANSWER_CHARS = 1_000
MAX_RESPONSE_CHARS = 10_000
CACHED_PAIRS = 100_000

GSM8K_TEMPLATE = """Question: A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?
Answer: The baker makes 6 * 12 = 72 rolls. After selling 50 there are 72 - 50 = 22 rolls left.
#### 22

Question: Mia reads 20 pages a day. Her book has 300 pages and she has read 120. In how many days will she finish it?
Answer: She has 300 - 120 = 180 pages to go. At 20 pages a day that takes 180 / 20 = 9 days.
#### 9

Question: A shirt costs $40 and is sold at 25% off. Tom pays for two of them with $100. How much does he get back?
Answer: The discount is 40 * 0.25 = 10 dollars, so a shirt costs 40 - 10 = 30. Two cost 60, and 100 - 60 = 40 is left.
#### 40

Question: {prompt}
Answer:"""

MATH_TEMPLATE = r"""Question: What is the sum of the roots of $x^2 - 7x + 10 = 0$?
Answer: The equation factors as $(x-2)(x-5) = 0$, so its roots are 2 and 5, with sum $7$. The answer is $\boxed{7}$.

Question: A fair die is rolled twice. What is the probability that both rolls are even?
Answer: Each roll is even with probability $\frac{3}{6} = \frac{1}{2}$, independently, so both are with probability
$\frac{1}{2} \cdot \frac{1}{2}$. The answer is $\boxed{\frac{1}{4}}$.

Question: Expand $(a+2)(a-3)$.
Answer: We get $a^2 - 3a + 2a - 6 = a^2 - a - 6$. The answer is $\boxed{a^2 - a - 6}$.

Question: {prompt}
Answer:"""

GSM8K_INSTRUCTION = "Think step by step, then give the answer, a number, on a last line of the form: #### 42"
MATH_INSTRUCTION = r"Think step by step and put the final answer in \boxed{}."

# --- The answer in a response ---

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"bn": 10**9, "lakh": 10**5, "crore": 10**7}
SCALE = rf"\s*(?i:{'|'.join(SCALES)})s?(?![A-Za-z])"
EXPONENT = r"(?:[eE]|\s*(?:\\times|\\cdot|[x*×])\s*10\s*\^\s*\{?\s*)([-+]?[0-9]{1,3})(?![0-9_])\}?"
# in "x-3" there is no -3, and in "x12" no 12 and no 2
NUMBER = re.compile(
    rf"(?:(?<![A-Za-z0-9_)}}])-)?(?<![A-Za-z0-9_^])(?<!\^\{{)"
    rf"\\?[$€£₹¥]?(?:[0-9]+ [0-9]+/[0-9]+|(?:[0-9]+\s*)?\\[dt]?frac\{{-?[0-9.]+\}}\{{[0-9.]+\}}|{DIGITS})"
    rf"(?:{EXPONENT})?(?:\^\{{?-?[0-9]+\}}?)?(?:{SCALE})*"
)
BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
# what stands before an item of a list, "x = ", and, behind a \0, between it and the next: words, signs, the same "x = "
LISTED = re.compile(
    r"(?s)(?:.*(\b[A-Za-z]\s*=\s*)|.*)\0(?:[\s,;$*]|(?:and|or)\b|\\(?:[][(),; ]|quad|text\s*\{\s*(?:and|or)\s*\})|\1)*"
)
UNBRACED_BOX = re.compile(r"\\boxed\s+([^\s{}$]*[0-9\\][^\s{}$]*|[A-Zxyz](?![A-Za-z]))")
ANSWER_IS = re.compile(r"(?:answer(?:s\s+are\b|\s+is\b|s?\s*(?:\*+\s*)?:)|<answer>)[\s:*]*(?=\S)", re.IGNORECASE)
MATH_SPAN = re.compile(
    r"\$\$([^$]+)\$\$|\$((?:\\\$|[^$])+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]", re.DOTALL
)
DIGIT_GAP = re.compile(  # [ \n], as \s would have the other spaces in common with the alternatives before it
    r"(?<=[0-9])(,?)[ \n]*(?:\{?(?:\\[,;:! ]|['~\xa0\u2009\u202f])\}?[ \n]*)+(,?)[ \n]*(?=[0-9]{3}(?![0-9]))"
)
TYPESETTING = re.compile(  # fonts, sizes, colours, distances; where it takes what is shown, the braces stay
    r"\\(?:(?:boldsymbol|bm|pmb|boldmath|math(?:bf|it|sf|tt|normal)|underline|emph|ensuremath|bf|it|rm|sf|tt|tiny|small|"
    r"(?:black)?square|normalsize|[lL]arge|LARGE|[hH]uge|[bB]igg?[lrm]?|(?:display|text|script)style|hfill)(?![A-Za-z])|"
    r"(?:text|math)(?:bf|it|rm|sf)?(?=\{[^{}]*\{)|(?:(?:text)?color|[hv]?phantom|[hv]space\*?) ?\{[^{}]*\}|"
    r"(?:begin|end)\{(?:align|gather|split)[a-z*]*\})"
)
IN_BRACES = re.compile(
    r"(?:\{|\\[(\[])((?:[^{}\\]|\\[^()\[\]]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)(?:\}|\\[)\]])"
)
ROW_GAP = re.compile(r"\\\\\*?\s*\[\s*(?:-?[0-9.]+\s*[a-z]{2}|\\[a-z]+)\s*\]|\\cr(?![a-z])")
SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{FRACTION SLASH}": "/", "∞": r"\infty"})
SPELLED = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion", "half": "1/2", "quarter": "1/4"}
BEHIND = re.compile(r"(?<=[0-9])([^0-9]*?)\s(?:per|for|every|each|after|because|since|which)\s.*")
REMARK = re.compile(
    r"\s[(\[](?!(?:or|maybe|perhaps|possibly)\b)(?=[^][()]*[A-Za-z=+*/×÷·-])[^][()]*[)\]]|"
    r"[,;]\s*(?:which|not|because|since|as)\b.*|" + BEHIND.pattern
)


# a number that begins an answer, behind which follow a place, a condition, or a calculation
PLACED = re.compile(
    r"^(\W*[0-9][0-9,./]*(?: [A-Za-z]+)?)"
    r"(?: (?:(?:when|if)\b.*|(?:out of|of the|in|with|on|at|before|within|during|among|across)\b[^=]*)|"
    r"(?:;|:(?! ?[0-9]{2}\b)| [—→]) .*)$"
)
# words in front of a number that say no more of it
NEUTRAL = re.compile(
    r"(?!.*\b(?:[b-zB-Z]|not|no|than|least|most|between|under|over|above|below|plus|minus|times|negative|root|pi|option|"
    r"choice|log|sin|cos|tan)\b)[A-Za-z ,:#']* \Z"
)
NEGATED = re.compile(
    r"(?i)(answer )(?:is not|isn't|is never|cannot be|can't be)\b(?:\.(?=[0-9])|[^.,;\n])*?"
    r"(?:,? but (?:rather )?|(?=[.,;\n]|\Z))"
)
HEADING = re.compile(r"\W*(?:(?:Step|Part|Case)\b|[0-9]+[.)] +\W*[A-Za-z])")
# where a base model goes on with another problem
ANOTHER = re.compile(r"\n[^\w\n]*(?:Question|Problem|Q|Human|User)(?: [0-9]+)?\W*:")


def math_answer(response: str) -> str | None:
    """The answer in a response to a `math` problem, or None: see the head of this file."""
    text = end_of(response)
    return first_usable(read(text) for read in (boxed, after_hashes, stated, last_math))


def gsm8k_answer(response: str) -> str | None:
    """The number that answers a `gsm8k` problem, or None: see the head of this file."""
    text = end_of(response)
    answers = (read(text) for read in (after_hashes, boxed, stated))
    number = next((number for answer in answers if answer and (number := number_in(answer)) is not None), None)
    return first_usable([number] if number is not None else [found[0] for found in NUMBER.finditer(text)][-1:])


def end_of(response: str) -> str:
    """The part of a response that may have its answer: a base model may go on and write a problem of its own."""
    answered = re.search(r"####|\\boxed|answer is|\Z", response).start()
    ends = (it.start() for it in ANOTHER.finditer(response) if it[0] == "\nQuestion:" or it.start() > answered)
    response = response[: next(ends, None)][-MAX_RESPONSE_CHARS:]
    response = NEGATED.sub(lambda it: f"{it[1]}is " if "but" in it[0] else "", response)
    return in_plain_digits(response)


def in_plain_digits(text: str) -> str:
    """A text without typesetting (fonts, colours, gaps between digits and rows); ½ is 1/2, and ² is ^{2}."""
    text = re.sub(r"\{\\(?:rm|bf|it|sf)\s+([^{}]*)\}|\\math(?:it|sf)\{([A-Za-z]{2,})\}", r"\\text{\1\2}", text)
    text = TYPESETTING.sub("", text)
    text = ROW_GAP.sub(r"\\\\", DIGIT_GAP.sub(r"\1\2", text.replace("{,}", ",")))
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: f" {unicodedata.normalize('NFKC', sign[0])}", text)
    text = re.sub("[⁺⁻]?[⁰¹²³⁴-⁹]+", lambda signs: f"^{{{unicodedata.normalize('NFKC', signs[0])}}}", text)
    text = re.sub(r"(\\text\s*\{[^{}]*)(\^\{[23]\})\s*\}", r"\1}\2", re.sub(r"(?:\\text\s*)?\{:\}", ":", text))
    text = re.sub(r"(?<=[0-9])\^(?:o(?![A-Za-z])|\{o\})", r"^\\circ", text)
    return text.translate(SIGNS)


def first_usable(answers: Iterable[str | None]) -> str | None:
    """The first of some answers that is neither None nor blank, cleaned; None if it is too long to be one."""
    answer = next(filter(None, (clean(answer) for answer in answers if answer)), "")
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{} holds; of nested ones, the inner; of "\boxed{a} and \boxed{b}", the list "a, b".
    A box without braces, "\boxed 5", holds the number or letter that follows."""
    boxes, opened = [], []  # boxes: start and end in the text, contents; opened: box starts, None for bare braces
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            contents = text[start.end() : token.start()] if start else ""
            if contents.strip() and not (boxes and boxes[-1][0] > start.start()):
                boxes.append((start.start(), token.end(), contents))
        elif token[0] != r"\{" and token[0] != r"\}":
            opened.append(None if token[0] == "{" else token)
    boxes += [(box.start(), box.end(), box[1]) for box in UNBRACED_BOX.finditer(text, boxes[-1][1] if boxes else 0)]
    return lists(boxes, text)[-1][2] if boxes else None


def lists(items: Sequence[tuple[int, int, str]], text: str) -> list[tuple[int, int, str]]:
    """Items of a text, (start, end, contents), in which those with only commas, "and" and "or" between them, or with
    the same "x = " before each, are one: the list "a, b"."""
    found: list = []
    for start, end, contents in items:
        if found and LISTED.fullmatch(f"{text[max(found[-1][0] - 9, 0) : found[-1][0]]}\0{text[found[-1][1] : start]}"):
            start, _, first = found.pop()
            contents = f"{first}, {contents}"
        found.append((start, end, contents))
    return found


def formulas(text: str, start: int = 0) -> list[tuple[int, int, str]]:
    """Start, end and contents of the formulas of a text; "$x = 1$ and $x = 2$" is the list "x = 1, x = 2"."""
    spans = [(span.start(), span.end(), span[span.lastindex]) for span in MATH_SPAN.finditer(text, start)]
    groups = itertools.groupby(spans, lambda span: span[2].partition("=")[0].strip() if "=" in span[2] else None)
    return [item for _, group in groups for item in lists(list(group), text)]


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last "####", or None; None also for a heading that a box or an answer follows."""
    line, _, rest = text.rpartition("####")[2].partition("\n")
    heading = HEADING.match(line) and ("\\boxed" in rest or ANSWER_IS.search(rest))
    return None if "####" not in text or heading else line


def stated(text: str) -> str | None:
    """The formula or sentence after the last "answer is" or "answer:"; of "the sum of the roots is 5", the "5"."""
    start = max((found.end() for found in ANSWER_IS.finditer(text)), default=None)
    if start is None:
        return None
    if MATH_SPAN.match(text, start):
        return formulas(text, start)[0][2]
    sentence = re.split(r"\.(?:\s|$)|\n|</|[,;] (?:since|because|as|which)\b", text[start:], maxsplit=1)[0]
    subject, _, predicate = sentence.partition(" is ")
    if predicate and not re.search("[0-9]", subject):
        sentence = predicate
    sentence = re.sub(r"(?<=[0-9]) [(\[](?:=|[^][()]*[A-Za-z]{2}).*", "", sentence)
    sentence = PLACED.sub(r"\1", BEHIND.sub(r"\1", sentence))
    words = re.match("[A-Za-z ,:]*", sentence)[0]
    if MATH_SPAN.match(sentence, len(words)):
        return formulas(sentence, len(words))[0][2]
    return sentence


def last_math(text: str) -> str | None:
    """The last formula or number, whichever ends last."""
    found = [item[1:] for item in formulas(text)[-1:]]
    found += [item[1:] for item in lists([(*it.span(), it[0]) for it in NUMBER.finditer(text)], text)][-1:]
    return max(found, key=lambda item: item[0])[1] if found else None


def number_in(answer: str) -> str | None:
    """The number that an answer in words gives: its only one, remarks aside; of equations and of "a is b", the only one
    of the last side, or else of the first. "" where that leaves a choice, None without a number. LaTeX stays as it is,
    behind its last "="."""
    words = unwrapped(clean(answer))
    if "\\" in words:
        return words.rpartition("=")[2]
    words = re.sub(
        r"\b(?:USD|EUR|GBP|CAD|AUD|CHF|INR|Rs|RM)\.? ?(?=[0-9])", "", re.sub("^- ", "-", words.replace(":00", ""))
    )
    words = PLACED.sub(r"\1", re.sub(r"\b(?:minus|negative) (?=[0-9])", "-", words))
    for glued in (r"(?<=[0-9]) ?([kKMB])\b", r" and (?:an? )?(half|quarter|[0-9]+/[0-9])"):
        words = re.sub(glued, lambda part: f" {SPELLED.get(part[1], part[1])}", words)
    words = re.sub(r"\b[0-9]{1,3}(?: [0-9]{3})+\b", lambda digits: digits[0].replace(" ", ""), words)
    bound = re.search(r"(?:^|\s)[<>≤≥] ?\$?[0-9]|^(?:not|under|below|above|(?:less|more|fewer|greater) than) ", words)
    bound = bound or re.search(r"[0-9] (?:squared|cubed|factorial|score|gross)\b", words)
    without = "" if bound else REMARK.sub(r"\1", words)
    sides = [[number[0] for number in NUMBER.finditer(side)] for side in re.split(r"=|\b(?:is|are|equals)\b", without)]
    # equal numbers are one; a longer one than MAX_ANSWER_CHARS is no answer
    sides = [[*{plain_key(text[:MAX_ANSWER_CHARS]) or text: text for text in side}.values()] for side in sides]
    found = [numbers[0] for numbers in (sides[-1], sides[0]) if len(numbers) == 1]
    percent = "%" if found and re.search(re.escape(found[0]) + " ?(?:%|percent)", words) else ""
    return found[0] + percent if found else "" if NUMBER.search(words) else None


# --- Comparison ---

WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
UNITS = "m s g h l L cm mm km dm kg mg lb ft yd mi in oz hr ml mL cc min sec mph kmh kph rpm hrs lbs gal deg am pm"
UNITS += " th st nd rd"
SQUARED = r"(?:[ckm]m|in|ft|mi|(?<= )m) ?\^\{?[23]\}?"
UNIT = rf"\s*(?:[A-Za-z]{{3,}}|{UNITS.replace(' ', '|')}|{SQUARED})(?:/[a-z]+)?(?![A-Za-z])"
PLAIN_NUMBER = re.compile(
    rf"(?:(?:\\approx|≈|approximately|about|roughly)\s*)?([-+]?)\s*[€£₹¥]?(?:([0-9]+) (?=[0-9]+/))?"
    rf"([0-9]{{1,3}}(?: [0-9]{{3}})+|{DIGITS})(?:{EXPONENT})?((?:{SCALE})*)(\s*(?:\\?%|percent))?((?:{UNIT})*)"
)
NO_UNIT = "percent|pct|hundred|thousand|illion|half|halves|thirds|quarters|base|squared|cubed|factorial|gross|score"
NO_UNIT += "|(?:ten|hundred|thousand|four|fif|six|seven|eigh|nin)ths?"
NOT_A_UNIT = re.compile(NO_UNIT, re.IGNORECASE)
UNREADABLE = re.compile(  # two numbers with no more than a unit between them, a number word, an arrow
    r"[0-9] *(?: |\\text\{(?! ?(?:and|or) ?\})[^{}]*\} *)[0-9]|\\to\b|"
    rf"[0-9]\s*(?:\\text\s*\{{)?\s*(?!percent|pct)(?:{NO_UNIT})\b"
)
FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([0-9.,]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9.]+)\s*\}|([0-9]))")
REPEATING = re.compile(  # 0.1\overline{6}, 0.\dot{1}2\dot{3}, 0.1(6), 0.1666...
    r"(?<![0-9.])([0-9]*)\.([0-9]{0,20}?)(?:\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?|"
    r"\(([0-9]+)\)|([0-9]{1,6}?)\7+\s*(?:\.{3}|…|\\[lc]?dots))"
)
VARIABLES = re.compile(r"(.*(?:[0-9})]|\\pi|(?<![A-Za-z\\])[A-Za-z]))(\s*)(?<![A-Za-z\\])([A-Za-z]+)", re.DOTALL)
LETTER = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?\s*([A-Z])\s*\)?[.:]?")
CHOICE = re.compile(r"(?:\(\s*[A-Z]\s*\)|[A-Z][).:])\s+(?!(?:or|and)\b|[-+*/^=<>(]\s*[^0-9])(.+)")
CHOSEN = re.compile(  # the letter of a choice, and what follows it, which is no other choice
    r"(?:(?i:the|answer|correct|option|choice|letter|is|clearly|\*)[ :*]*)*\(?\s*([A-Z])(?:\s*+\))?+[*:.]*+"
    r"(?!\s*(?:,|;|and|or|&|\\&|/|-)?\s*\(?[A-Z]\b)"
    r"(?:\s*+(?![A-Za-z=+^<>]|\\[a-p])[^A-Za-z=].*|\s+(?:because|since|as|for)\b.*)?"
)
ASKED_SCALE = re.compile(rf"\bhow many (?:more )?(?:{'|'.join(SCALES)})|\bin (?:{'|'.join(SCALES)})s\b", re.IGNORECASE)
# what is dropped: the base of a number, a modulus, the exponent of a unit
DROPPED = re.compile(
    r"[0-9]\)?_\{?\s*([0-9]+)\s*\}?|[(p]mod[ {]*([0-9]+)|[0-9}]\s*(?:[A-Za-z]{2,}|m)\s*\^\s*\{?([0-9])\}?$"
)
RATIO = re.compile("(?<=[0-9]) ?: ?(?=[0-9])")
TO = re.compile(r"(?<=[0-9])\s*(?:\\text\s*\{\s*to\s*\}|\bto\b|\\colon|\\text\s*\{:\}|\{:\})\s*(?=[0-9])")
LABEL = re.compile(
    r"^(?:\\text\s*\{[^{}]*\}|[A-Za-z]+|[a-zA-Z](?:\^\{[^{}]*\})?\([a-z0-9]+\)|"
    r"\\lim_\{.*\} ?(?:[a-z]\([a-z]\)|[a-z]_[a-z]))\s*(?:=|\\equiv)\s*(?!.*=)"
)
CONDITION = re.compile(  # behind an answer
    r"(?<=.)(?:\s|\\q?quad)*(?:,?\s*\\(?:text|mbox)\s*\{\s*\(?(?:when|at|attained|where|since|because|if|for|out of|"
    r"or about|or approximately)\b.*|\(\s*\\approx.*\)|,\s*[a-z]\s*\\(?:neq?|in)(?![a-z]).*|"
    r"(?<=[\sd])\(\s*[a-z]\s*(?:[=<>]|\\(?:neq?|in|[lg]eq?)(?![a-z]))[^()]*\))$"
)
BASE = re.compile(r"(?<=[0-9A-Z])\s*(?:_\s*)?\{?(?:\\text\s*\{\s*)?\(?\s*(?:in )?base\s*\}?\s*([0-9]+)\s*\)?\s*\}?\}?")
ORDERED = re.compile(r"\bfrom (?:least|smallest|greatest|largest) to\b|\border the\b", re.IGNORECASE)
IMPLIES = re.compile(r"\\(?:implies|Rightarrow|Longrightarrow)(?![a-z])")
RELATION = re.compile(r"\\(?:[lg]eq?|[lg]t|neq?|leqslant|geqslant)(?![a-z])|[<>≤≥≠]")
OPERATION = re.compile(r"\\(?!left|right|pi|text|mbox|circ|display|infty)[A-Za-z]+|[-+*/^!]|\)\(")
TASK = re.compile(  # at the end of a text without spaces: the formula that follows is to be computed
    r"(?:Expand|Factor|Simplify|Comput|Evaluat|Calculat|Find|Convert|Whatis|Write)[A-Za-z:,]*(?:\\[\[(])?$",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=4096)
def clean(answer: str) -> str:
    """An answer without dollar signs, thin spaces, line breaks and final punctuation."""
    answer = re.sub(r"\\?\$|\\!|\0|(?<!\\)\\[()\[\]]", "", in_plain_digits(answer))
    answer = " ".join(re.sub(r"(?<!\\)\\[,;: ]|~", " ", answer).split())
    answer = re.sub(r"\{?(?<![0-9a-z])([0-9a-z]+)\s*\\choose\s*([0-9a-z]+)\}?", r"\\binom{\1}{\2}", answer)
    answer = re.sub(r"^\\text ?\{(?![A-Z]:)[^{}]*(?:\bis|[:=]) ?\} ?", "", answer)
    answer = re.sub(r"^< ?([^<>,]*) ?>$", r"\1", re.sub(r"^(?:\\q?quad ?)+|(?: ?\\q?quad)+$", "", answer))
    while inner := IN_BRACES.fullmatch(answer):
        answer = inner[1].strip()
    dots = re.search(r"\.[0-9]+(\.{3})[. ]*$", answer)  # 0.333... is no 0.333
    return (answer.rstrip(". ,;:\\*_`") + (dots[1] if dots else "")).lstrip("*_`: ")


def unwrapped(answer: str) -> str:
    r"""An answer without \text{} and its like."""
    return " ".join(WRAPPER.sub(r" \1 ", answer).split()).rstrip(". ")


def as_fraction(decimal: re.Match) -> str:
    """A repeating decimal, a match of REPEATING, as a fraction."""
    start, period = decimal[1] + decimal[2], "".join(filter(None, decimal.groups()[2:]))
    bottom = (10 ** len(period) - 1) * 10 ** len(decimal[2])
    return rf"\frac{{{int(start + period) - int(start or 0)}}}{{{bottom}}}"


@functools.lru_cache(maxsize=CACHED_PAIRS)
def plain_keys(answer: str) -> tuple[str, ...]:
    """What decides the equality of answers that need no algebra, numbers and choice letters; () for others. A
    percentage has two, 28 and 0.28 for 28%."""
    text = unwrapped(REPEATING.sub(as_fraction, answer))
    if letter := LETTER.fullmatch(text):
        return (letter[1],)
    number = PLAIN_NUMBER.fullmatch(" ".join(FRAC.sub(r" \1\2/\3\4", text).split()))
    if number is None or NOT_A_UNIT.search(number[7]) or re.search("/0+$", number[3]):
        return ()
    top, _, bottom = re.sub("[, ]", "", number[3]).partition("/")  # Fraction() itself does not read "1.5/3"
    value = (int(number[2] or 0) + Fraction(top) / int(bottom or 1)) * (-1 if number[1] == "-" else 1)
    value *= Fraction(10) ** int(number[4] or 0)
    value *= math.prod(SCALES[word.rstrip("s")] for word in re.findall("[a-z]+", number[5].lower()))
    return (number_key(value), number_key(value / 100)) if number[6] else (number_key(value),)


def plain_key(answer: str) -> str | None:
    """The first of `plain_keys`, a wrong answer's vote, or None."""
    return next(iter(plain_keys(answer)), None)


@functools.lru_cache(maxsize=4096)
def text_key(answer: str) -> str:
    """An answer as a text: equal ones need no algebra either. Words are compared without case."""
    text = unwrapped(answer)
    if re.fullmatch("[A-Za-z ]{3,}", text):
        return re.sub(r"\b(?:a|an|the|it|is|was|are|on)\b ?", "", text.lower()).strip()
    return re.sub(r"\\(?:left|right)(?![a-z])|(?<![0-9])\s|\s(?![0-9])|(?<=\\)[dt](?=frac|binom)", "", text)


MISREAD = {  # what math-verify takes for something else, or not at all
    # numbers with thousands apart would be lists; units between numbers hide the second one
    r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])": lambda it: it[0].replace(",", ""),
    rf"(?<=[0-9])\s*\\text\s*\{{(?!\s*(?:and|or|{NO_UNIT}))[^{{}}]*\}}(?:\^\{{?[23]\}}?)?"
    r"(?=\s*(?:[,+-]|\\times|\\cdot))": "",
    # sets and intervals
    r"\\([lr])brace(?![a-z])": lambda it: r"\{" if it[1] == "l" else r"\}",
    r"\\(?:left|right)(?=\\[{}])|(?:\\;)?\\middle(?![a-z])": "",
    r"\A\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?)?\s*(?:\\mid|:|\|)\s*(.*?)\s*\\\}\Z": r"\1",
    r",\s*[a-z]\s*\\in\s*\\mathbb\{?R\}?\s*\Z": "",
    r"(\]|\\infty\))\s*(?:\\text\s*\{\s*or\s*\}|or|\\bigcup)\s*([(\[])": r"\1\\cup \2",
    # degrees in a function are no radians; macros and names without braces or backslash
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?-?[0-9]\}?)?)\s*[({]*\s*([0-9.]+)\s*\^\s*\{?\\circ\}?\s*[)}]*": (
        r"\1{(\\frac{\2\\pi}{180})}"
    ),
    r"\\[dtc]?frac\s*(\\[a-z]+)\s*(?=[0-9a-z{])": r"\\frac{\1}",
    r"\\sqrt\[([0-9]+)\] ?([0-9a-z])": r"\\sqrt[\1]{\2}",
    r"\\(?:operatorname|text|mathrm)\s*\{\s*((?:arc)?(?:ln|log|sin|cos|tan)|gcd|lcm)\s*\}(?=([A-Za-z0-9])?)|"
    r"(?<![A-Za-z\\])(ln|log|sin|cos|tan)(?=[( ])": lambda it: f"\\{it[1] or it[3]}" + " " * bool(it[2]),
    r"\\(sin|cos|tan) ([a-z])(?= *(?:\\cdot|\\sin|\\cos|\\tan))": r"\\\1{(\2)}",
    # sets in words, intervals with turned brackets, a pair in a set
    r"(?i)\A\\text\s*\{\s*(?:the )?(?:empty set|no (?:real )?solutions?)\s*\}\Z|\A\\\{\s*\\\}\Z": r"\\emptyset",
    r"(?i)\A(?:\\text\s*\{\s*all real numbers\s*\}|-\\infty\s*<\s*[a-z]\s*<\s*\\infty)\Z": r"(-\\infty,\\infty)",
    r"\](?=\s*-\\infty)": "(",
    r"(?<=\\infty)\s*\[": ")",
    r"\A\\\{\s*(\([^()]*\))\s*\\\}\Z": r"\1",
    # signs and words
    r"\s*\^\s*\{?\\circ\}?\s*(?:\\text\s*\{\s*)?[FC]\s*\}?\Z": r"^\\circ",
    r",?[\\; ]*(?:\\(?:text|mathrm|mbox)\s*\{[\\ ]*,?[\\ ]*(?:and|,)[\\ ]*\}|\\&)": ", ",
    r"\\(?:simeq|doteq|sim)(?![a-z])": r"\\approx ",
    r"(?<![A-Za-z\\])pi(?![a-z])": r"\\pi ",
    r"(?<![A-Za-z\\])sqrt\(([^()]*)\)": r"\\sqrt{\1}",
    r"\*\*": "^",
    r"(?<=[0-9)])!=": "! =",
    r"\{([0-9A-Z]+)\}(?=_)": r"\1",
    r"(?<![0-9.])([0-9]+) ([0-9]+)/([0-9]+)": r"\1\\frac{\2}{\3}",
    r"(?<=[0-9])[eE]([-+]?[0-9]+)(?![0-9_])": r" \\times 10^{\1}",
    r"\^(-[0-9]+)": r"^{\1}",
    r"\A(-?[0-9.,/]+)\s*=\s*([A-Za-z])\Z": r"\2=\1",
    r"\(([0-9A-Z]+)\)(?=_)": r"\1",
    r"\\log_\{?e\}?": r"\\ln ",
    r"\\log_([0-9]) ": r"\\log_{\1} ",
    r"\\varnothing": r"\\emptyset",
    r"\\lor(?![a-z])": "or",
    r"\\(?:land|wedge)(?![a-z])": "and",
    r"\\pmod ?(?:\{[0-9]+\}|[0-9]+)|\((?:\\text\s*\{ ?)?mod *\}? *[0-9]+\)|\\text\s*\{ ?\(mod *\}? *[0-9]+\)": "",
    r"\\langle(?![a-z])": "(",
    r"\\rangle(?![a-z])": ")",
}


@functools.lru_cache(maxsize=4096)
def for_algebra(answer: str) -> str:
    """An answer in a form that math-verify reads rightly."""
    answer = REPEATING.sub(as_fraction, answer)
    for pattern, plain in MISREAD.items():
        answer = re.sub(pattern, plain, answer)
    return ", ".join(answer.replace(r"\pm", sign) for sign in "+-") if r"\pm" in answer else answer


def without_algebra(gold: str, answer: str) -> tuple[bool, str] | None:
    """(whether the answer is right, what it votes by if wrong), or None where that takes algebra."""
    golds, keys = plain_keys(gold), plain_keys(answer)
    if text_key(gold) == text_key(answer) and not (golds and ", " in answer):  # 12, 345 is a list
        return True, ""
    dropped = [{*DROPPED.findall(unwrapped(text))} for text in (gold, answer)]
    wrong = all(dropped) and dropped[0] != dropped[1] or RELATION.match(answer) and not RELATION.match(gold)
    wrong = wrong or RATIO.search(answer) and ":" not in gold
    letters = [{*re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+|[A-Za-z]{3,}", "", unwrapped(x)))} for x in (gold, answer)]
    lower = [{*map(str.lower, names)} for names in letters]
    wrong = wrong or letters[0] != letters[1] and (len(letters[0]) > 1 and lower[0] == lower[1])
    if golds and keys and not wrong:
        return golds[0] == keys[0] or len(golds) != len(keys) and not {*golds}.isdisjoint(keys), keys[0]
    unreadable = UNREADABLE.search(for_algebra(answer))
    return (False, f"text {text_key(answer)}") if wrong or unreadable else None


CHECKERS = Workers("math")
checked: dict[tuple[str, str], tuple[bool, str] | str] = {}  # what the workers found, oldest first


def judged(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[bool, str] | str]:
    """For each (gold, answer): (right or not, what it votes by if wrong), or the name of what went wrong. Time-outs are
    kept like verdicts, since a policy repeats itself; other failures may have been the machine's fault."""
    verdicts = {pair: without_algebra(*pair) or checked.get(pair) for pair in pairs}
    jobs = [pair for pair, verdict in verdicts.items() if verdict is None]
    for pair, (result, failure) in zip(jobs, CHECKERS.map([[*map(for_algebra, pair)] for pair in jobs])):
        words = re.fullmatch("[a-z ]{3,}", text_key(pair[1]))
        verdicts[pair] = failure or (result[0], plain_key(pair[1]) or (words[0] if words else result[1]))
        if failure in (None, "timeouts"):
            checked[pair] = verdicts[pair]
    while len(checked) > CACHED_PAIRS:
        del checked[next(iter(checked))]
    return verdicts


def with_variables(answer: str, names: set[str]) -> str:
    """An answer with braces around variables at its end, by which math-verify knows them from units. names: the
    letters that are variables of the problem."""
    if not (match := VARIABLES.fullmatch(answer)):
        return answer
    head, gap, letters = match.groups()
    known = letters in UNITS.split() and not {*letters} <= names and not re.search(r"(?<!\\p)[A-Za-z]$", head)
    word = len(letters) > (2 if gap else 3) and letters.lower() not in string.ascii_lowercase
    return answer if known or word or letters == "i" else f"{head}{gap}{{{letters}}}"


def pairs_of(problem: Problem, answers: Iterable[str | None]) -> list[tuple[str, str] | None]:
    """(gold, answer) for each answer to a problem, as it lets them be read: the letter or the text of "(C) 12", letters
    that are its variables, "2 dozen" where dozens are asked for. None where there is no answer."""
    gold, pairs = with_base(clean(problem.answer)), []
    ordered = ORDERED.search(problem.prompt) and "," in gold
    texts = (re.sub(r"\\[A-Za-z]+", " ", WRAPPER.sub(" ", formula)) for _, _, formula in formulas(problem.prompt))
    names = {*re.findall("[A-Za-z]", " ".join(texts)), *re.findall("[0-9]([A-Za-z])$", gold)}
    for answer in answers:
        read = answer and as_asked(answer, gold, problem.prompt)
        pair = (with_variables(gold, names), with_variables(read, names)) if answer else None
        pairs.append(tuple(f"({text.replace('<', ',')})" for text in pair) if pair and ordered else pair)
    return pairs


def as_asked(answer: str, gold: str, prompt: str) -> str:
    """An answer without what only the gold answer or the prompt tells from the answer itself: the text or the letter of
    a choice, a label, a condition, the scale that was asked for, words in front of a number."""
    answer = with_base(answer)
    if LETTER.fullmatch(unwrapped(gold)):
        answer = choice[1] if (choice := CHOSEN.fullmatch(unwrapped(answer))) else answer.replace("=", ",")
    elif choice := CHOICE.fullmatch(unwrapped(answer)):
        answer = choice[1]
    elif "=" not in gold:
        answer = LABEL.sub("", answer)
    answer = answer if CONDITION.search(gold) else CONDITION.sub("", answer)
    if ":" in gold:
        answer = TO.sub(":", answer)
    elif re.search(r"\bratio\b", prompt):
        answer = RATIO.sub("/", answer)
    if ASKED_SCALE.search(prompt):
        answer = re.sub(SCALE, "", answer)
    if (words := re.match(r"[A-Za-z ,:#']* ", unwrapped(answer))) and plain_keys(gold) and NEUTRAL.match(words[0]):
        answer = number_in(answer) or answer
    return answer


def with_base(answer: str) -> str:
    """An answer in which the base of a number, "52 (base 8)", is an index."""
    return BASE.sub(r"_{\1}", answer)


def is_echo(problem: Problem, gold: str, answer: str) -> bool:
    """Whether an answer that equals the gold one is an unevaluated formula of the problem: one with operations that
    stands in the prompt, where the prompt asks to compute it, or where it is no number and the gold answer has fewer
    operations. The equation of a curve, with a power on its left side, is one unless the prompt has that side."""

    def plain(text: str) -> str:
        text = re.sub(r"\{([-A-Za-z0-9]+)\}|\s", r"\1", FRAC.sub(r"\1\2/\3\4", text_key(clean(text))))
        return re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text)

    def order_free(text: str) -> str:
        return "".join(sorted(re.sub(r"[(){}+*]", "", re.sub(r"\(([^()]*)\)/\(([^()]*)\)", r"\\frac{\1}{\2}", text))))

    gold, answer = plain(gold), plain(IMPLIES.split(answer)[-1])
    answer = answer[1:-1] if re.fullmatch(r"\([^()]*\)", answer) else answer
    if sorted(gold) == sorted(answer) or not answer:
        return False
    prompt = plain(problem.prompt)
    curve, is_equation, last = answer.partition("=")
    if is_equation and "=" not in gold and re.search(r"(?<![A-Za-z\\])[a-z]\^", curve):
        return order_free(curve) not in (order_free(plain(text)) for _, _, text in formulas(problem.prompt))
    before, found, _ = prompt.partition(answer)
    answer = last if is_equation and curve == last and last else answer
    same = (start for start, _, text in formulas(problem.prompt) if order_free(plain(text)) == order_free(answer))
    if not found:
        if (start := next(same, None)) is None:
            return False
        before = plain(problem.prompt[:start])
    least, count = len(OPERATION.findall(gold)), len(OPERATION.findall(answer))
    return count > least and not plain_keys(answer) or count > 0 and TASK.search(before) is not None


def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]], answer_in: Callable) -> Verdict:
    """See `Task.verify`. answer_in: `math_answer` or `gsm8k_answer`. Raises RuntimeError if no worker can start."""
    rows = [pairs_of(problem, map(answer_in, row)) for problem, row in zip(problems, responses)]
    verdicts = judged([pair for row in rows for pair in row if pair])

    def vote(problem: Problem, pair: tuple[str, str] | None) -> bool | str | None:
        """True for the gold answer."""
        if not isinstance(verdict := verdicts.get(pair), tuple):
            return None
        return f"text {pair[1]}" if verdict[0] and is_echo(problem, *pair) else verdict[0] or verdict[1]

    voters = [[vote(problem, pair) for pair in row] for problem, row in zip(problems, rows)]
    failures = [verdicts[pair] for row in rows for pair in row if isinstance(verdicts.get(pair), str)]
    rewards = torch.tensor([[float(voter is True) for voter in row] for row in voters])
    return Verdict(rewards, votes_from_answers(voters), dict(collections.Counter(failures)))


# --- Data ---


def problem_from(row: dict, where: str, numeric: bool) -> Problem:
    """The problem in one row, whose columns are those at the head of this file. `where` names the row in errors."""
    texts = {name: row[name] for name in ("problem", "question", "answer", "solution") if row.get(name) is not None}
    for name, value in texts.items():
        if isinstance(value, (list, dict, bytes)):
            raise BadInput(f"{where}: {name} is a {type(value).__name__}, not a text or a number; correct this row")
    prompt = str(texts.get("problem", texts.get("question", ""))).strip()
    given, solution = (str(texts.get(name, "")) for name in ("answer", "solution"))
    if "####" in given:
        solution = solution or re.sub("<<[^<>]*>>", "", given)  # <<...>>: GSM8K's calls of a calculator
        given = after_hashes(given)
    answer = clean(given or boxed(solution) or "")
    if not prompt or not answer:
        raise BadInput(f"{where}: empty {'answer' if prompt else 'problem'}; correct or remove this row")
    if re.search("[\ud800-\udfff]", prompt):
        raise BadInput(f"{where}: half a character (\\ud800 to \\udfff), which no tokenizer reads; correct this row")
    if len(answer) > MAX_ANSWER_CHARS:
        raise BadInput(f"{where}: an answer of {len(answer)} characters; {MAX_ANSWER_CHARS} is the most")
    if numeric:
        number = answer.rstrip("%\\")
        if not plain_key(number) or (number := number_in(number)) is None:
            raise BadInput(f"{where}: the answer {answer[:40]!r} is not a number; --task math takes any answer")
        answer = number.replace(",", "")
    return Problem(prompt, answer, solution, level_number(row.get("level")))


def level_number(level: object) -> int | None:
    """5 from "Level 5", "5" or 5; None from None or "Level ?"."""
    number = re.fullmatch(r"(?:level)?\s*([0-9]{1,9})(?:\.0)?", str(level).strip(), re.IGNORECASE)
    return int(number[1]) if number else None


def load(name: str, data: str | None = None) -> Task:
    """The task; see `load_task`. Raises BadInput for data that cannot be read, and without math-verify."""
    if importlib.util.find_spec("math_verify") is None:
        raise BadInput(f"task {name!r} needs the math-verify library: pip install math-verify==0.9.0")
    (hub_id, config), numeric, splits = SOURCES[name], name == "gsm8k", {}
    where = data or hub_id
    for split in ("train", "test"):
        rows = [] if (name, split) == ("math500", "train") else load_rows(hub_id, split, data, config)
        place = f"{where}, {split}"
        require_columns(rows, ["problem|question", "answer|solution"], place)
        splits[split] = [problem_from(row, f"{place} row {i}", numeric) for i, row in enumerate(rows, start=1)]
        levels = [row["level"] for row in rows if row.get("level") is not None]
        if wrong := [level for level in levels if level_number(level) is None]:
            what = f"{len(wrong)} levels that are no number, such as {ascii(wrong[0])[:40]}"
            print(f"{place}: {what}: these problems have no level", file=sys.stderr)
    if not any(splits.values()):
        raise BadInput(f"{where} has no {'test' if name == 'math500' else 'train or test'} split")
    of_gsm8k = gsm8k_answer, GSM8K_TEMPLATE, GSM8K_INSTRUCTION, 256
    answer_in, template, ask, tokens = of_gsm8k if numeric else (math_answer, MATH_TEMPLATE, MATH_INSTRUCTION, 512)
    check = functools.partial(verify, answer_in=answer_in)
    return Task(name, **splits, verify=check, template=template, instruction=ask, max_new_tokens=tokens)
