"""Hostile input, by property: whatever a policy writes or a file holds, each parser, extraction rule, reader and
estimator gives a result of the right form, or one clear line of refusal; none crashes and none hangs.

Hand-picked cases are in each module's own tests; here hypothesis picks, always the same examples."""

import dataclasses
import io
import itertools
import json
import math
import signal
from functools import partial, reduce
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_code import CONTEST, HUMANEVAL, MBPP, SANITIZED, TACO, TACO_FUNCTION

import common
import harness.policy
import majority_pg
import pass_at_k_pg
from verifiers import BadInput, Problem, arithmetic, load_task, reasoning_gym, rows, workers
from verifiers import code_tasks as code
from verifiers import math_tasks as math_task
from verifiers.sandbox.pool import STATUSES, Program

HANG_S = 120  # far more than any test here needs, also on a machine that is busy


@pytest.fixture(autouse=True)
def guard():
    """Fails a test that hangs, even inside a regular expression or an `except Exception`."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {HANG_S} s"))
    signal.setitimer(signal.ITIMER_REAL, HANG_S, HANG_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


SAME = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])


def examples(count, *known):
    """As many examples, the same in every run, with no time limit on one and no files; and those that are known, where
    a tuple holds several arguments."""
    tuples = [one if isinstance(one, tuple) else (one,) for one in known]
    return lambda test: reduce(lambda test, one: example(*one)(test), tuples, settings(SAME, max_examples=count)(test))


# --- Texts that nobody meant to write ---
ODD = ["\0", "\ud800", "\udfff", "\u202e", "\u2066", "\u2028", "\x85", "\x1b[2J", "\ufeff", "٣", "９", "\N{MINUS SIGN}"]
BLANK = ["", " ", "\n", "\r\n", "\t", "\xa0", "\u3000"]
MATHS = [r"\boxed{", r"\boxed ", r"\text{", r"\frac{", "{", "}", r"\{", "$", "$$", r"\$", r"\(", r"\)", r"\[", r"\]",
         "####", "answer", "answer is ", "answer:", "*", ":", " is ", "=", "\\", "€", "^", "and"]  # fmt: skip
NUMBERS = ["0", "7", "12", "1,", "1,234", ".", "/", "-", "+", "%", "9" * 50, "abc", "million"]
CODES = ["```", "```python\n", "def f", "    ", "x", "(", ")", "[", "'", '"""', "return", "#", "lambda:", ";"]
TAGS = ["<answer>", "</answer>"]
PIECES = st.sampled_from(ODD + BLANK + MATHS + NUMBERS + CODES + TAGS)
TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),  # with lone surrogates
    st.binary(max_size=40).map(lambda data: data.decode("latin-1")),
    st.lists(PIECES, max_size=30).map("".join),
)
LONG = st.builds(  # up to a million characters and a little more
    lambda start, piece, share, end: start + piece * int(share * 10**6 / max(len(piece), 1)) + end,
    TEXTS, st.lists(PIECES, min_size=1, max_size=3).map("".join), st.floats(0, 1), TEXTS,
)  # fmt: skip
RESPONSES = st.one_of(TEXTS, TEXTS, LONG)


def check_form(verdict, responses):
    """What `Verdict` promises of any responses."""
    shape = (len(responses), len(responses[0]))
    assert verdict.rewards.shape == verdict.votes.shape == shape
    assert verdict.rewards.dtype == torch.float32 and verdict.votes.dtype == torch.int64
    assert verdict.rewards.isfinite().all() and (verdict.rewards >= 0).all() and (verdict.rewards <= 1).all()
    for row in verdict.votes.tolist():
        assert all(vote == -1 or vote <= i and row[vote] == vote for i, vote in enumerate(row))
    assert all(isinstance(name, str) and count > 0 for name, count in verdict.counts.items())


# --- Rewards of any type and size ---
REWARDS = torch.tensor([[8, 0, 4, 8, 1, 0, 2], [-3, 2, -3, 2, 0, 5, 2], [0, 0, 0, 1, 0, 0, 0]]).double() / 8
VOTES = torch.tensor([[0, 1, 2, 0, 4, 1, 6], [0, 1, 0, 1, -1, 5, 1], [0, 0, 2, 3, -1, 0, 0]])
DTYPES = {  # factors of these rewards, and how far advantages may be from those in float64
    torch.float64: (1e-300, 1e300, 1e-12), torch.float32: (1e-30, 1e30, 1e-6), torch.bfloat16: (1e-30, 1e30, 2e-2),
    torch.float16: (1e-3, 100.0, 2e-3), torch.int64: (8, 800, 1e-6), torch.uint8: (8, 80, 1e-6), torch.bool: (8, 1e-6),
}  # fmt: skip
estimators = pytest.mark.parametrize("estimator", ["mean", "unbiased", "biased"])
scripts = pytest.mark.parametrize("script", [pass_at_k_pg, majority_pg], ids=lambda script: script.__name__)


def advantages(script, rewards, k, estimator):
    votes = [VOTES[: len(rewards), : rewards.shape[1]]] if script == majority_pg else []
    return script.advantages(*votes, rewards, k, estimator)


@scripts
@estimators
@pytest.mark.parametrize("dtype", DTYPES)
def test_advantages_of_any_dtype_and_magnitude_are_those_in_float64(script, estimator, dtype):
    *factors, rtol = DTYPES[dtype]
    for factor, k in itertools.product(factors, range(1, 7)):
        rewards = (REWARDS.abs() * factor).to(dtype)
        A, expected = (advantages(script, r, k, estimator) for r in (rewards, rewards.double()))
        assert A.dtype == (dtype if dtype.is_floating_point else torch.float32)
        torch.testing.assert_close(A.double(), expected, rtol=rtol, atol=rtol * rewards.double().max().item())


@scripts
@estimators
@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_rewards_have_no_advantage(script, estimator, n):
    """Rounded, the mean of seven times .1 is not .1."""
    for reward, k in itertools.product((0.1, 1 / 3, -1e6, 0.0), range(1, n + 1)):
        A = advantages(script, torch.full((1, n), reward), k, estimator)
        assert (A == (0 if n > 1 or estimator == "biased" else torch.tensor(reward))).all()  # alone: no baseline


@scripts
def test_with_k_1_unbiased_is_mean_and_biased_is_zero(script):
    counted = REWARDS.masked_fill(VOTES < 0, 0) if script == majority_pg else REWARDS
    mean = advantages(script, counted, 1, "mean")
    torch.testing.assert_close(advantages(script, REWARDS, 1, "unbiased"), mean, rtol=1e-12, atol=1e-12)
    assert (advantages(script, REWARDS, 1, "biased") == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.uint8])
def test_metrics_of_any_dtype_are_float64_and_those_of_the_same_float64_rewards(dtype):
    rewards = (REWARDS * 8).abs().to(dtype)
    for metric in (common.pass_at_k, lambda r, k: common.best_of_k(r, r, k), partial(majority_pg.majority_at_k, VOTES)):
        for k in (1, 3, 6):
            found = metric(rewards, k)
            assert found.dtype == torch.float64 and torch.equal(found, metric(rewards.double(), k))


# --- arithmetic ---
@examples(100, "1," * 500_000, "1," * 500_000 + "1", "1" * 10**6 + "x", "0" * 10**6, "９", "1,٣")
@given(st.one_of(RESPONSES, st.text("0123456789, \n", max_size=20)))
def test_number_is_plain_digits_or_none(response):
    number, parts = arithmetic.number(response), response.strip().split(",")
    plain = all(part.isascii() and part.isdigit() for part in parts)
    assert number == ((parts[-1].lstrip("0") or "0") if plain else None)
    verdict = arithmetic.verify([Problem("?", "24")], [[response, "024"]])
    check_form(verdict, [[response, "024"]])
    assert verdict.rewards.tolist() == [[number == "24", 1]] and (verdict.votes[0, 0] == -1) == (number is None)


# --- Mathematics ---
@examples(120, r"\boxed{" + "9" * 5000 + "} answer: " + "9" * 2000, "\\boxed{\0" + "7}", "<answer> \n</answer>")
@given(RESPONSES)
def test_an_extracted_answer_is_short_clean_text_of_the_response(response):
    for extract in (math_task.math_answer, math_task.gsm8k_answer, reasoning_gym.answer_in):
        answer = extract(response)
        assert answer is None or answer.strip() == answer != ""
    for extract in (math_task.math_answer, math_task.gsm8k_answer):
        answer = extract(response) or ""
        assert len(answer) <= math_task.MAX_ANSWER_CHARS and "\0" not in answer and "\n" not in answer
        if len(response) < math_task.MAX_RESPONSE_CHARS:
            assert (extract(response + "\n\nQuestion: 2+2?\nAnswer: \\boxed{4}\n#### 4") or "") == answer
        if not set(response) & set("kKM"):  # 3k is read as 3 thousand
            assert set(answer) <= {*math_task.in_plain_digits(response), *", "}  # boxes are joined by commas


@pytest.mark.parametrize("start, piece, end", [
    ("answer", " ", ""), ("answer", " ", ": "), ("answer **", " *", ""), (r"\boxed", " ", ""),
    ("", r"\boxed{ ", "}" * 2000), ("", "1,111", "x"), ("", r"\$", ""), (r"\(", "x", ""), ("", r"\text{", ""),
    ("", "9", ""), ("", "1 ", ""), ("", "$1$, ", ""), (r"\boxed{0.", "9", "!}"), (r"\boxed{0.", "12", "!}"),
    (r"\boxed{0.\dot9", "12", "!}"), ("1", "\xa0", "x"), ("#### 1", " [a", ""), ("#### 1 (", "a", ""),
])  # fmt: skip
def test_a_whole_batch_of_the_slowest_responses_is_read_in_time(start, piece, end):
    """A policy that learns to write one of these writes it in every sample."""
    text = start + piece * ((math_task.MAX_RESPONSE_CHARS - len(start) - len(end)) // len(piece)) + end
    for _ in range(100):
        for extract in (math_task.math_answer, math_task.gsm8k_answer, reasoning_gym.answer_in):
            extract(text)


@examples(200, "1" + "a" * 998 + "!", "7 " + "apples" * 150 + " 7", "1.5/3", "1/0", "0.0/1")
@given(st.one_of(st.lists(st.sampled_from(NUMBERS + ["(C)", r"\text{", "}", " "]), max_size=20).map("".join), TEXTS))
def test_any_two_answers_are_compared(answer):
    """Without algebra, or not at all; it neither raises nor hangs, and an answer is equal to itself."""
    assert math_task.without_algebra(answer, answer) == (True, "")
    assert math_task.plain_key(answer) is None or math_task.plain_key(math_task.clean(answer)) is not None
    right, form = math_task.without_algebra("24.125", answer) or (False, "")
    assert not right and form in ("", math_task.plain_key(answer), f"text {math_task.text_key(answer)}")


BOXES = [  # what is in a box may take the worker processes, and 5 seconds, for all that is known
    "x" * 900, "{" * 500, "(" * 300, "1+" * 490 + "1", "\u202e12", "\ud800", "\\", "%", "1/0", "a," * 400, "^" * 99,
    "9^9^9^9", r"\sqrt{" * 150 + "2" + "}" * 150, r"\frac{1}{0}", "\0" * 9 + "7", r"2^{1000000}", "1.5/3",
    *(digit + "a" * 900 + "!" for digit in "12"), "9" * 1000, "9" * 10**6,
]  # fmt: skip


@examples(5, [[rf"\boxed{{{text}}}" for text in BOXES]], [["", "\0" * 10**6, "{" * 10**6, "#### " + "9" * 5000]])
@given(st.lists(st.lists(RESPONSES, min_size=3, max_size=3), min_size=1, max_size=2))
def test_math_verdicts_on_any_responses(responses):
    for extract in (math_task.math_answer, math_task.gsm8k_answer):
        verdict = math_task.verify([Problem("?", "24.125")] * len(responses), responses, extract)
        check_form(verdict, responses)
        assert not verdict.rewards.any() and set(verdict.counts) <= {"timeouts", "late", "dead workers", "errors"}
        answered = torch.tensor([[extract(response) is not None for response in row] for row in responses])
        assert not (verdict.votes >= 0)[~answered].any()
        assert int((answered & (verdict.votes < 0)).sum()) == sum(verdict.counts.values())


# --- Programs ---
@pytest.mark.parametrize("piece", [
    "(", "-", "x.", "1+", "a=", "@a\n", "```\nf(x)\n```\n", "`", "~~~ x\n", "it's ", "    \n", "if 1: 1\nelif ",
    "if x:\n", "for x in ", "a, ", "f(",
])  # fmt: skip
def test_no_response_keeps_the_reader_of_programs_busy(piece):
    """A policy that learns to write one of these writes it in every sample; none may end the interpreter."""
    for names, prefix in ((["f"], ""), (["f"], "def f(x):\n"), ([], "")):
        for start in ("", "x", " "):
            code.source_in((start + piece * code.MAX_RESPONSE_CHARS)[: code.MAX_RESPONSE_CHARS], names, prefix)


CODE_ROWS = [("humaneval", HUMANEVAL), ("mbpp", MBPP), ("mbpp_sanitized", SANITIZED), ("code_contests", CONTEST),
             ("taco", TACO), ("taco", TACO_FUNCTION)]  # fmt: skip
READERS = {"humaneval": code.humaneval, "code_contests": code.code_contest, "taco": code.taco}
CODE_PROBLEMS = [READERS.get(name, code.mbpp)(row) for name, row in CODE_ROWS]


@examples(60)
@given(RESPONSES, st.sampled_from(CODE_PROBLEMS))
def test_any_response_makes_a_program_with_the_problem_s_own_tests(response, problem):
    program, reference = code.program_of(problem, response), code.program_of(problem, problem.solution)
    added = len(problem.prompt) + len(json.loads(problem.answer)["imports"])
    assert isinstance(program.source, str) and len(program.source) <= 5 * len(response) + added + 4
    assert dataclasses.replace(program, source="") == dataclasses.replace(reference, source="")


@examples(1, [["\0" * 10**6, "(" * 10**6, "#" * 10**6, "```\n" * 10**5, "\ud800", "\n" * 10**6]] * 6)
@given(st.lists(st.lists(RESPONSES, min_size=6, max_size=6), min_size=6, max_size=6))  # a sandbox a response
def test_code_verdicts_on_any_responses(responses):
    verdict = code.verify(CODE_PROBLEMS, responses)
    check_form(verdict, responses)
    assert not verdict.rewards.any() and (verdict.votes == -1).all() and set(verdict.counts) <= set(STATUSES)


@examples(25, ["9" * 10**6, "", "9" * 32], ["x\0", "\ud800", "'''"], ["x\n", "x\r\n#", "x;1"], ["x*0.5", "x==x", "x/1"])
@given(st.lists(st.one_of(RESPONSES, st.text("0123456789x+*/%()- ", max_size=12)), min_size=3, max_size=3))
def test_values_of_any_expressions_are_integers_or_none(expressions):
    values = code.values_of(expressions)
    for expression in expressions:
        status, row = values[expression]
        assert status in STATUSES
        assert row is None or len(row) == len(code.INPUTS) and all(type(value) is int for value in row)
    verdict = code.verify_programs([Problem("?", json.dumps([0.5] * len(code.INPUTS)))], [expressions])
    check_form(verdict, [expressions])
    assert not verdict.rewards.any()


# --- Worker processes ---
CHILD = """
import sys, time
print('{"result": null, "failure": null}', flush=True)
for line in sys.stdin:
    if "die" in line:
        sys.exit(1)
    ANSWER
"""
SAY = "sys.stdout.write(%s); sys.stdout.flush()"
WHOLE = repr('{"result": 7, "failure": null}\n')


@pytest.mark.parametrize("answer, result, failure", [
    (SAY % WHOLE, 7, None), (SAY % f"{WHOLE}[:9]" + "; time.sleep(.2); " + SAY % f"{WHOLE}[9:]", 7, None),
    ("time.sleep(.5); " + SAY % WHOLE, 7, None),  # of wall time, of which a crowded machine takes more
    (SAY % repr("{") + "; time.sleep(600)", None, "late"), ("time.sleep(600)", None, "late"),
    ("while True: " + SAY % repr("{") + "; time.sleep(.001)", None, "late"),
    ("while True: " + SAY % "'{' * 9999", None, "dead workers"),
    (SAY % r"'{\n'", None, "dead workers"), (SAY % r"'[' * 10**6 + '\n'", None, "dead workers"),
])  # fmt: skip
def test_no_answer_of_a_worker_hangs_its_parent_or_fills_it(tmp_path, monkeypatch, answer, result, failure):
    """A child that says half a line, one byte after the other, a line that never ends, or one that cannot be read."""
    child = tmp_path / "child.py"
    child.write_text(CHILD.replace("ANSWER", answer))
    monkeypatch.setattr(workers, "__file__", str(child))
    pool = workers.Workers("stand-in", limit_s=0.2, count=2)
    assert pool.map([["x"], ["die"], ["x"]]) == [(result, failure), (None, "dead workers"), (result, failure)]
    pool.close()


# --- Files ---
GOOD = [{"problem": "1+1?", "answer": "2", "level": "Level 5"}, {"problem": "שלום \u2028 2*3?", "answer": "6"},
        {"question": "3?", "answer": "#### 3", "solution": None}]  # fmt: skip
LINES = [json.dumps(row, ensure_ascii=False) for row in GOOD]
PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": None, **row} for row in GOOD]), PARQUET)
FILES = {  # suffix -> ways to write these rows
    ".jsonl": [(bom + end.join(LINES) + end).encode() for bom in ("", "\ufeff") for end in ("\n", "\r\n", "\n\n \n")],
    ".json": [f"[{','.join(LINES)}]".encode()],
    ".parquet": [PARQUET.getvalue()],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def problems_or_refusal(task, path, contents):
    """The test problems of a file with these contents, each of the right form, or None: refused in one clear line."""
    path.write_bytes(contents)
    try:
        problems = load_task(task, str(path)).test
    except BadInput as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 700
        return None
    for problem in problems:
        assert type(problem.prompt) is type(problem.answer) is type(problem.solution) is str
        assert problem.prompt.encode().strip() and problem.answer.strip()
        assert problem.level is None or type(problem.level) is int
    return problems


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@examples(60, b'"problem, question, answer"', b"[" * 10**5, b'{"problem": ' * 10**5, b"\n" * 10**6, b"\0" * 10**6)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=50).map(lambda data: b"PAR1" + data + b"PAR1"),
                 TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
                 st.text("[]{}:,\"\\\n 019.eE-nul", max_size=60).map(str.encode)))  # fmt: skip
def test_files_of_any_bytes_are_refused(folder, suffix, contents):
    assert problems_or_refusal("math", folder / f"bytes{suffix}", contents) is None


@pytest.mark.parametrize("suffix", FILES)
@examples(60)
@given(st.data())
def test_a_torn_or_altered_file_gives_whole_rows_or_a_refusal(folder, suffix, data):
    contents = data.draw(st.sampled_from(FILES[suffix]))
    whole = problems_or_refusal("math", folder / f"whole{suffix}", contents)
    assert [problem.answer for problem in whole] == ["2", "6", "3"] and whole[0].level == 5
    torn = contents[: data.draw(st.integers(0, len(contents) - 1))]
    problems = problems_or_refusal("math", folder / f"torn{suffix}", torn)
    if problems is not None:  # it was torn between lines
        assert problems == whole[: len(problems)] and suffix == ".jsonl"
        assert torn.decode("utf-8-sig").rpartition("\n")[2].strip() in ["", *LINES]
    altered = bytearray(contents)
    for place in data.draw(st.lists(st.integers(0, len(contents) - 1), min_size=1, max_size=3)):
        altered[place] ^= 1 << data.draw(st.integers(0, 7))
    problems_or_refusal("math", folder / f"altered{suffix}", bytes(altered))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just("9" * 5000))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
COLUMNS = st.sampled_from(["problem", "question", "answer", "solution", "level"])


HUGE = [{"level": "9" * 5000}, {"answer": "1.5/3"}, {"answer": "1" + "a" * 900 + "!"},
        {"answer": "<" * 10**6 + "#### 1"}, {"solution": r"\boxed{" * 10**4 + "}" * 10**4, "answer": None}]  # fmt: skip


@pytest.mark.parametrize("task", ["math", "gsm8k"])
@examples(50, *(([change], True) for change in HUGE), ([{"x" * 10**5: 1}], False))
@given(st.lists(st.dictionaries(COLUMNS | TEXTS, VALUES, max_size=4), max_size=3), st.booleans())
def test_math_rows_of_any_values_give_problems_or_a_refusal(folder, task, changes, whole):
    """`whole`: changes to good rows, else rows with nothing but the changes."""
    good = {"problem": "1+1?", "answer": "2"}
    text = "".join(json.dumps({**good, **change} if whole else change) + "\n" for change in changes)
    problems = problems_or_refusal(task, folder / "rows.jsonl", text.encode())
    if problems is not None:
        assert len(problems) == len(changes)
        assert all(len(problem.answer) <= math_task.MAX_ANSWER_CHARS for problem in problems)


@pytest.mark.parametrize("table, problems", [  # what a JSON file cannot hold
    *((pyarrow.table(columns), None) for columns in (  # the last are no UTF-8 and the year 148000
        {}, {"problem": pyarrow.array([], pyarrow.string())}, {"problem": [b"\xff"], "answer": [b"1"]},
        {"problem": pyarrow.array([b"\xff"]).view(pyarrow.utf8()), "answer": ["1"]},
        {"problem": pyarrow.array([2**62], pyarrow.timestamp("us")), "answer": ["1"]})),
    (pyarrow.table({"problem": ["a" * 10**6], "answer": [2.5], "extra": ["b"]}), [Problem("a" * 10**6, "2.5")]),
    (pyarrow.table([["a"], ["1"], ["b"]], ["problem", "answer", "problem"]), [Problem("b", "1")]),
])  # fmt: skip
def test_parquet_tables_give_whole_problems_or_a_refusal(folder, table, problems):
    pyarrow.parquet.write_table(table, contents := io.BytesIO())
    assert problems_or_refusal("gsm8k", folder / "table.parquet", contents.getvalue()) == problems


JSON_TEXTS = st.sampled_from(["[]", "{}", "null", "[1]", '{"inputs": 5}', '{"inputs": [1], "outputs": [null]}',
                              '{"inputs": ["1"], "outputs": ["1"], "fn_name": 5}'])  # fmt: skip
NESTED = st.sampled_from([[None], [[]], [{}], {"input": [1], "output": [2]}, {"input": ["1"], "output": [None]},
                          {"input": 5, "output": 2}, {"language": [3], "solution": [None]}])  # fmt: skip
FIELDS = st.one_of(VALUES, JSON_TEXTS, NESTED, st.sampled_from(["-" * 10**5 + "1", "(" * 3000, "a\nb", '"""']))


@examples(200)
@given(st.sampled_from(CODE_ROWS), st.data())
def test_code_rows_with_a_field_of_any_value_give_problems_or_a_refusal(folder, named_row, data):
    name, row = named_row
    row = {**row, data.draw(st.sampled_from(sorted(row))): data.draw(FIELDS)}
    problems = problems_or_refusal(name, folder / "code.jsonl", json.dumps(row).encode())
    for problem in problems or []:
        program = code.program_of(problem, "pass")
        assert isinstance(program, Program) and all(type(text) is str for case in program.cases for text in case)


@pytest.mark.parametrize("name, row", [
    ("mbpp", MBPP | {"test_list": []}), ("mbpp", MBPP | {"text": "\ud800"}), ("humaneval", HUMANEVAL | {"prompt": ""}),
    ("code_contests", CONTEST | {"public_tests": {"input": [1], "output": [2]}}),
    *((name, {"question": 7, "answer": "7"}) for name in ("humaneval", "mbpp", "code_contests", "taco")),  # another's
])  # fmt: skip
def test_code_rows_that_cannot_be_problems_are_refused(folder, name, row):
    (folder / "code.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadInput, match=f"{name}, .*row 1: .* has the schema"):
        load_task(name, str(folder / "code.jsonl"))


@examples(60, "~nobody-of-this-name/train.jsonl", "x" * 5000 + ".jsonl", "x" * 10**6, "\0.jsonl")
@given(RESPONSES.filter(lambda path: path.strip("./")))
def test_paths_of_any_text_are_refused(path):
    with pytest.raises(BadInput) as refusal:
        rows.load_rows("unused/id", "train", f"/nowhere/{path}" if path[0] != "~" and len(path) < 9000 else path)
    assert "cannot read" in str(refusal.value) or "does not exist" in str(refusal.value)


# --- Prompts ---
TOKENIZER = harness.policy.tiny_tokenizer()


@examples(60, ("", None), ("<eos>", None), ("\ud800", None), ("x" * 10**6, 64), ("\u202e" * 10**4, None))
@given(TEXTS, st.sampled_from([64, None]))
def test_any_prompt_of_a_file_is_tokens_or_refused(folder, prompt, context):
    """From the file to the tokenizer of the `tiny` policy: what a reader lets through can be encoded."""
    row = json.dumps({"problem": prompt, "answer": "1"}).encode()
    problems = problems_or_refusal("math", folder / "prompt.jsonl", row) or [Problem("", "1")]
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=context))
    policy = SimpleNamespace(tokenizer=TOKENIZER, model=SimpleNamespace(config=config))
    try:
        (ids,) = harness.policy.encode_prompts(policy, SimpleNamespace(words=None, template="{prompt}"), problems, 8)
    except BadInput as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 700
        assert not problems[0].prompt or context
    else:
        assert 0 < len(ids) <= (context or math.inf) and set(ids) <= set(range(len(TOKENIZER)))
