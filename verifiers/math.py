"""Tasks `gsm8k`, `math` and `math500`: mathematics with a final answer, compared by the `math-verify` library.

Data, by task (`--data PATH` gives any of them local files instead, see rows.py):
  gsm8k    openai/gsm8k, configuration main: 7473 train / 1319 test; the answer follows "####".
  math     nlile/hendrycks-MATH-benchmark: the 12 000 train / 500 test split of Hendrycks MATH by Lightman et al. 2023
           (arXiv 2305.20050) that Chow et al. use, with levels 1-5; its test side is MATH-500.
  math500  HuggingFaceH4/MATH-500: those 500 problems, for evaluation only.
Your own problems: columns `problem` (or `question`), `answer`, optionally `solution` and `level` ("Level 5", "5", 5).
`answer` may be a GSM8K solution that ends in "#### N"; without one, the last \\boxed{} of `solution` is the answer.

Which part of a response is its answer. The response ends where it goes on to a "Question:" of its own; of the rest the
last 10 000 characters are read, and the first rule that finds something decides:
  math     the last \\boxed{}; what follows the last "####"; what follows the last "answer is" or "answer:"; the last
           $...$ or number, whichever ends later
  gsm8k    "####", \\boxed{}, "answer is", in this order, where they hold a number; the last number
An answer of more than 1000 characters is none. No answer: reward 0 and no vote.

Rewards and votes. An answer that the verifier finds equal to the gold one has reward 1 and votes for "the gold answer";
any other has reward 0 and votes for its own canonical form: numbers by value, to 6 decimals; expressions by value at a
fixed point; sets by their elements (workers.canonical). Reward and vote so depend on the problem and the answer alone,
never on the other responses: the vote is a partition, the same in any order, and all who vote alike have the same
reward. Pairwise comparison would not do: to math-verify 5 equals "x = 5" and "y = 5", which differ from each other.
Plain numbers, choice letters and equal texts need no algebra; other pairs go to worker processes (workers.py).
A comparison that takes over 5 s, or whose worker dies, gives reward 0 and no vote, and is counted in `Verdict.counts`.

Decided, where math-verify or its users differ:
  several boxes       the last one counts (math-verify: the first, or all); with only commas and "and" between, a list
  "$18", "18 dollars" equal: currency signs, and words after a number, are units, and units are not compared
  "(C)" and "C"       equal: a single capital letter, in brackets or not, is a choice
  1/3 and 0.3333333   equal: decimals count to 6 places, 0.333 is not 1/3; below 10^-6 plain numbers must agree exactly
  28% and 28          equal, as in math-verify; so are 28% and 0.28 against a gold 0.28
  x = 5 and 5         equal when either is gold, as in math-verify
"""

import collections
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
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
INSTALL = "pip install math-verify==0.9.0"
MAX_ANSWER_CHARS = 1_000
MAX_RESPONSE_CHARS = 10_000
CACHED_PAIRS = 100_000

# --- Prompts ---

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

NEXT_QUESTION = "\nQuestion:"  # where a model without a chat template runs on into a problem of its own
GSM8K_INSTRUCTION = "Think step by step, then give the answer, a number, on a last line of the form: #### 42"
MATH_INSTRUCTION = r"Think step by step and put the final answer in \boxed{}."

# --- The answer in a response ---

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+"
FRACTION = re.compile(r"-?\\[dt]?frac\{-?[0-9.]+\}\{[0-9.]+\}")
# in "x-3" there is no -3, and in "x12" no 12 and no 2
NUMBER = re.compile(rf"(?:(?<![A-Za-z0-9_)}}])-)?(?<![A-Za-z0-9_])\\?[$€£]?(?:{DIGITS})")
BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
BETWEEN_BOXES = re.compile(r"(?:\s|[,$]|and\b|\\(?:[\[\]()]|quad|text\s*\{\s*and\s*\}))*")
UNBRACED_BOX = re.compile(r"\\boxed\s+([^\s{}$]+)")
ANSWER_IS = re.compile(r"answer(?:\s+is\b|\s*(?:\*+\s*)?:)[\s:*]*(?=\S)", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
LEADING_WORDS = re.compile(r"[A-Za-z ,:]*")
MATH_SPAN = re.compile(
    r"\$\$([^$]+)\$\$|\$((?:\\\$|[^$])+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]", re.DOTALL
)


def math_answer(response: str) -> str | None:
    """The answer in a response to a `math` problem, or None: see the head of this file."""
    text = end_of(response)
    return first_usable(boxed(text), after_hashes(text), stated(text), last_math(text))


def gsm8k_answer(response: str) -> str | None:
    """The number that answers a `gsm8k` problem, or None: see the head of this file."""
    text = end_of(response)
    found = [after_hashes(text), boxed(text), stated(text)]
    return first_usable(*[number_in(answer) for answer in found if answer], *NUMBER.findall(text)[-1:])


def end_of(response: str) -> str:
    """The part of a response in which its answer is looked for."""
    return response.split(NEXT_QUESTION, 1)[0][-MAX_RESPONSE_CHARS:].replace("\N{MINUS SIGN}", "-")


def first_usable(*answers: str | None) -> str | None:
    """The first of some answers that is neither None nor blank, cleaned; None if it is too long to be one."""
    answer = next(filter(None, (clean(answer) for answer in answers if answer)), None)
    return answer if answer is not None and len(answer) <= MAX_ANSWER_CHARS else None


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{} holds; of nested ones, the inner; of "\boxed{a} and \boxed{b}", the list "a, b".

    A box without braces, "\boxed 5", holds the word that follows.
    """
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
    if not boxes:
        return None
    last = len(boxes) - 1
    while last and BETWEEN_BOXES.fullmatch(text, boxes[last - 1][1], boxes[last][0]):
        last -= 1
    return ", ".join(contents for _, _, contents in boxes[last:])


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last "####"."""
    return text.rpartition("####")[2].partition("\n")[0] if "####" in text else None


def stated(text: str) -> str | None:
    """The formula or sentence after the last "answer is" or "answer:"; of "the sum of the roots is 5", the "5"."""
    last = None
    for last in ANSWER_IS.finditer(text):
        pass
    if last is None:
        return None
    start = last.end()
    formula = MATH_SPAN.match(text, start)
    if formula:
        return formula[formula.lastindex]
    sentence = SENTENCE_END.split(text[start:], maxsplit=1)[0]
    subject, _, predicate = sentence.partition(" is ")
    if predicate and not re.search("[0-9]", subject):
        sentence = predicate
    words = LEADING_WORDS.match(sentence)
    formula = MATH_SPAN.match(sentence, words.end())
    return formula[formula.lastindex] if formula else sentence


def last_math(text: str) -> str | None:
    r"""The last formula, \frac{}{} or number, whichever ends last."""
    found = [(span.end(), span[span.lastindex]) for span in MATH_SPAN.finditer(text)][-1:]
    found += [(fraction.end(), fraction[0]) for fraction in FRACTION.finditer(text)][-1:]
    found += [(number.end(), number[0]) for number in NUMBER.finditer(text)][-1:]
    return max(found, key=lambda item: item[0])[1] if found else None


def number_in(answer: str) -> str | None:
    """The number that an answer in words gives: its first, or the first after its last "="; LaTeX is left as it is."""
    words = unwrapped(clean(answer)).rpartition("=")[2]
    number = NUMBER.search(words)
    return words if "\\" in words else number and number.group()


# --- Comparison ---

WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
PLAIN_NUMBER = re.compile(rf"([-+]?)[€£]?({DIGITS})(?:\s*[A-Za-z]{{3,}}(?![A-Za-z]))*")
NOT_A_UNIT = re.compile("percent|pct|hundred|thousand|illion|dozen|half|halves|thirds|quarters|base", re.IGNORECASE)


def clean(answer: str) -> str:
    """An answer without dollar signs, thin spaces, line breaks and final punctuation."""
    answer = answer.replace("\N{MINUS SIGN}", "-").replace(r"\$", "").replace("$", "")
    answer = answer.replace("{,}", ",").replace(r"\!", "").replace("\0", "")
    return " ".join(answer.split()).rstrip(". ,;:\\*").lstrip("*: ")


def unwrapped(answer: str) -> str:
    r"""An answer without \text{} and its like."""
    return " ".join(WRAPPER.sub(r" \1 ", answer).split()).rstrip(". ")


@functools.lru_cache(maxsize=CACHED_PAIRS)
def plain_key(answer: str) -> str | None:
    """What decides the equality of answers that need no algebra, numbers and choice letters; None for others."""
    text = unwrapped(answer)
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", text):
        return text.strip("()")
    number = PLAIN_NUMBER.fullmatch(text)
    if number is None or NOT_A_UNIT.search(text) or re.search("/0+$", number[2]):
        return None
    top, _, bottom = number[2].replace(",", "").partition("/")  # Fraction() itself does not read "1.5/3"
    return number_key(Fraction(number[1] + top) / int(bottom or 1))


def text_key(answer: str) -> str:
    """An answer as a text: equal ones need no algebra either. Words are compared without case."""
    text = unwrapped(answer)
    if re.fullmatch("[A-Za-z ]{3,}", text):
        return text.lower()
    return re.sub(r"\\(?:left|right)(?![a-z])|\s", "", text).replace("dfrac", "frac").replace("tfrac", "frac")


def without_algebra(gold: str, answer: str) -> tuple[bool, str] | None:
    """(whether the answer is right, what it votes by if wrong), or None where that takes algebra."""
    gold_key, key = plain_key(gold), plain_key(answer)
    if text_key(gold) == text_key(answer):
        return True, ""
    return (gold_key == key, key) if gold_key and key else None


CHECKERS = Workers("math")
checked: dict[tuple[str, str], tuple[bool, str]] = {}  # what the workers found, oldest first, CACHED_PAIRS at most


def judged(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[bool, str] | str]:
    """For each (gold, answer): (whether right, what it votes by if wrong), or the name of what went wrong."""
    verdicts = {pair: without_algebra(*pair) or checked.get(pair) for pair in pairs}
    jobs = [pair for pair, verdict in verdicts.items() if verdict is None]
    for (gold, answer), (result, failure) in zip(jobs, CHECKERS.map(jobs)):
        if failure:
            verdicts[gold, answer] = failure  # not kept: it may have been the machine's fault, not the answer's
            continue
        correct, form = result
        word = text_key(answer) if re.fullmatch("[A-Za-z ]{3,}", unwrapped(answer)) else None
        verdicts[gold, answer] = checked[gold, answer] = correct, plain_key(answer) or word or form
    while len(checked) > CACHED_PAIRS:
        del checked[next(iter(checked))]
    return verdicts


def verify(
    problems: Sequence[Problem], responses: Sequence[Sequence[str]], answer_in: Callable[[str], str | None]
) -> Verdict:
    """See `Task.verify`. answer_in: the task's reading of a response.

    Raises RuntimeError if the worker processes cannot start.
    """
    golds = [clean(problem.answer) for problem in problems]
    answers = [[answer_in(response) for response in row] for row in responses]
    pairs = [(gold, answer) for gold, row in zip(golds, answers) for answer in row if answer is not None]
    verdicts = judged(pairs)
    counts = dict(collections.Counter(verdicts[pair] for pair in pairs if isinstance(verdicts[pair], str)))
    rewards, voters = [], []
    for gold, row in zip(golds, answers):
        found = [verdicts.get((gold, answer)) for answer in row]
        found = [None if isinstance(verdict, str) else verdict for verdict in found]
        rewards.append([float(verdict is not None and verdict[0]) for verdict in found])
        voters.append([verdict and (True if verdict[0] else verdict[1]) for verdict in found])
    return Verdict(torch.tensor(rewards), votes_from_answers(voters), counts)


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
        number = number_in(answer.rstrip("%\\")) if plain_key(answer.rstrip("%\\")) else None
        if number is None:
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
        raise BadInput(f"task {name!r} needs the math-verify library: {INSTALL}")
    hub_id, config = SOURCES[name]
    where, numeric = data or hub_id, name == "gsm8k"
    splits = {}
    for split in ("train", "test"):
        rows = [] if (name, split) == ("math500", "train") else load_rows(hub_id, split, data, config)
        place = f"{where}, {split}"
        require_columns(rows, ["problem|question", "answer|solution"], place)
        splits[split] = [problem_from(row, f"{place} row {i}", numeric) for i, row in enumerate(rows, start=1)]
        levels = [row["level"] for row in rows if row.get("level") is not None]
        wrong = [level for level in levels if level_number(level) is None]
        if wrong:
            what = f"{len(wrong)} levels that are no number, such as {ascii(wrong[0])[:40]}"
            print(f"{place}: {what}: these problems have no level", file=sys.stderr)
    if not any(splits.values()):
        raise BadInput(f"{where} has no {'test' if name == 'math500' else 'train or test'} split")
    answer_in = gsm8k_answer if numeric else math_answer
    return Task(
        name,
        **splits,
        verify=functools.partial(verify, answer_in=answer_in),
        template=GSM8K_TEMPLATE if numeric else MATH_TEMPLATE,
        instruction=GSM8K_INSTRUCTION if numeric else MATH_INSTRUCTION,
        max_new_tokens=256 if numeric else 512,
    )
