"""The code tasks: rows to problems, responses to programs, and verdicts on real reference solutions."""

import json
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import common
from harness.policy import texts_read
from verifiers import BadInput, Problem, load_task
from verifiers import code_tasks as code
from verifiers.sandbox.judge import difference
from verifiers.sandbox.pool import Result, shared

REAL_DATA = os.environ.get("REAL_DATA")
real_data = pytest.mark.skipif(not REAL_DATA, reason="REAL_DATA does not name the folder with the data sets")

# fmt: off
HUMANEVAL = dict(task_id="HumanEval/0", prompt='def double(x):\n    """ Twice x. """\n', entry_point="double",
                 canonical_solution="    return 2 * x\n",
                 test="def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n")
MBPP = dict(text="Write a function to sum a pair.", task_id=1, test_setup_code="q = Pair(5, 6)", challenge_test_list=[],
            code="class Pair(object):\r\n\tdef __init__(self, a, b):\r\n\t\tself.a, self.b = a, b\r\n"
                 "def sum(p):\r\n\treturn p.a + p.b",
            test_list=["assert sum(Pair(1, 2)) == 3", "assert sum(q) == 11"])
SANITIZED = dict(prompt="Write a function to take a root.", task_id=2, test_imports=["import math"], source_file="",
                 code="def root(n):\n  return n ** 0.5",
                 test_list=["assert math.isclose(root(4), 2.0, rel_tol=0.001)",
                            "assert [root(n * n) for n in (3, 5)] == [3, 5]"])
CONTEST = dict(name="sum", description="Print the sum.", difficulty=7, input_file="", output_file="",
               public_tests=dict(input=["1 2\n"], output=["3\n"]), private_tests=dict(input=["5 5\n"], output=["10\n"]),
               generated_tests=dict(input=[], output=[]), solutions=dict(
                   language=[2, 3], solution=["int main() {}", "print(sum(map(int, input().split())))"]))
TACO = dict(question="Print the sum.", solutions='["print(sum(map(int, input().split())))"]', starter_code="",
            difficulty="HARD", input_output=json.dumps(dict(inputs=["1 2\n", ["5", "5"]], outputs=["3\n", ["5"]])))
TACO_FUNCTION = dict(
    question="Return the sorted pair.", starter_code="class Solution:\n    def order(self, a, b):\n", difficulty="EASY",
    solutions=json.dumps(["class Solution:\n    def order(self, a, b):\n        return tuple(sorted((a, b)))"]),
    input_output=json.dumps(dict(fn_name="order", inputs=[[2, 1], [3, 4]], outputs=[[[1, 2]], [3, 4]])))
# fmt: on


def task_of(tmp_path: Path, name: str, *rows: dict):
    """The task of a folder with these rows in both splits."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(name, str(tmp_path))


def rewards(task, problem: Problem, *responses: str) -> list[float]:
    return task.verify([problem], [list(responses)]).rewards[0].tolist()


def statuses(problems: list[Problem], solutions: list[str]) -> list[str]:
    return [r.status for r in shared().run([code.program_of(*pair) for pair in zip(problems, solutions)])]


# ---------------------------------------------------------------------------------------------------------- schemas
@pytest.mark.parametrize("name, row, wrong", [
    ("humaneval", HUMANEVAL, "    return x\n"), ("mbpp", MBPP, MBPP["code"].replace("+", "-")),
    ("mbpp_sanitized", SANITIZED, "def root(n): return n"), ("code_contests", CONTEST, "print(3)"),
    ("taco", TACO_FUNCTION, "class Solution:\n    def order(self, a, b): return [a, b]"),
])  # fmt: skip
def test_the_solution_of_each_schema_passes_and_a_wrong_one_fails(tmp_path, name, row, wrong):
    task = task_of(tmp_path, name, row)
    problem = task.test[0]
    assert len(task.train) == (0 if name == "humaneval" else 1)
    verdict = task.verify([problem, problem], [[problem.solution, wrong], [wrong, wrong]])
    assert verdict.rewards.tolist() == [[1.0, 0.0], [0.0, 0.0]] and verdict.rewards.dtype == torch.float32
    assert verdict.votes.tolist() == [[-1, -1], [-1, -1]] and verdict.votes.dtype == torch.int64


@pytest.mark.parametrize("name, row, read, tokens", [
    ("humaneval", HUMANEVAL, HUMANEVAL["prompt"], 512), ("code_contests", CONTEST, "Print the sum.\n", 1024),
    ("mbpp", MBPP, f"{MBPP['text']}\nYour code should pass this test:\nassert sum(Pair(1, 2)) == 3\n", 512),
])  # fmt: skip
def test_what_a_pretrained_policy_reads_and_how_long_it_may_write(tmp_path, name, row, read, tokens):
    """It goes on with HumanEval's prompts, and begins a line behind the others. Of MBPP's tests it sees the first. A
    chat model is told what to do."""
    task = task_of(tmp_path, name, row)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
    assert texts_read(tokenizer, task, task.test)[0] == [read] and task.max_new_tokens == tokens
    tokenizer.chat_template = "user {{ messages[0].content }} assistant "
    ask = "Write the program in Python, in one code block."
    assert texts_read(tokenizer, task, task.test)[0] == [f"user {task.test[0].prompt}\n\n{ask} assistant "]


def test_taco_reads_lists_of_lines_and_levels():
    problem = code.taco(TACO)
    assert problem.level == 4 and json.loads(problem.answer)["cases"] == [["1 2\n", "3\n"], ["5\n5", "5"]]
    solution = "import sys\nx = [*map(int, sys.stdin.read().split())]\nprint(sum(x) if sum(x) < 9 else 5)"
    assert statuses([problem], [solution]) == ["passed"]


def test_contests_that_cannot_be_judged_are_left_out_and_counted(tmp_path, capsys):
    untested = {**CONTEST, "public_tests": None, "private_tests": None}
    task = task_of(tmp_path, "code_contests", CONTEST, {**CONTEST, "input_file": "in.txt"}, untested)
    assert len(task.train) == 1 and "2 of 3 rows of split 'train' left out" in capsys.readouterr().err


@pytest.mark.parametrize("output, expected, same", [
    ("1 2\n3", "1   2 3\n", True), ("1.0000001", "1.0", True), ("0.999", "1.0", False), ("YES", "yes", False),
    ("1 2", "1 2 3", False), ("1 2 3", "1 2", False), ("", "", True), ("1e3", "1000.0", True), ("1000", "1e3", True),
    ("-.5", "-0.5", True), ("5.", "5.0", True), ("1e-9", "0.0", True), ("nan", "nan", True),
    # a tolerance only for what is expected as a float
    ("1000001", "1000000", False), ("3.0", "3", False), ("3.0", "3.", True),
    # digits as everybody writes them
    ("1_0.0", "10.0", False), ("\uff11.0", "1.0", False), ("\u0661.5", "1.5", False), ("nan", "1.0", False),
    ("inf", "1e999", False), ("1\u00a02", "1 2", False), ("0x1p0", "1.0", False), ("1" * 70 + ".0", "1" * 70, False),
])  # fmt: skip
def test_outputs_are_compared_token_by_token(output, expected, same):
    assert (difference(output.encode(), expected.encode()) == "") == same


# ------------------------------------------------------------------------------------------------------- extraction
FULL, SAME = "def double(x):\n    return 2 * x\n", "def double(x): return x\n"
RIGHT = [  # where twice x is asked for
    "    return 2 * x\n", "return 2 * x\n", "    y = x\n    return y + x\n\n\nThis doubles x (it's easy).", FULL,
    HUMANEVAL["prompt"] + "    return 2 * x", f"```python\n{FULL}```\nFor example:\n```\nprint(double(2))\n```",
    f"```python\n{SAME}```\nNo, wait:\n```py\n{FULL}```", f"The code:\n```\n{FULL}",
    "```python\n    return 2 * x\n```", f"~~~\n{FULL}a = '\\\n```\n'\n~~~",
    f"```python\nfrom __future__ import annotations\nfrom __future__ import division\n{FULL}```",
    "1. So:\n\n   ```python\n" + textwrap.indent(FULL, "   ") + "   ```\n\n2. Done.", "double = lambda x: 2 * x",
    "```python\ndouble: object = lambda x: 2 * x\n```\nso that\n```python\ndouble == 3\ndoubled = 4\n```",
    f"```python\n{FULL}```\nand not\n```python\ndef double_it(x): return 3 * x\n```",
    # continuations that a closing fence, an example or a main guard ends
    "    return 2 * x\n\n```python\nx = int(input())\nprint(double(x))\n```",
    "\n   \n    return 2 * x\n```\nDone.",
    "    return 2 * x\n\nif __name__ == '__main__':\n    import doctest\n    doctest.testmod()\n```\n\nIt doubles.",
    # the first space lost in decoding, or another indentation
    "   if x:\n        return 2 * x\n    return 0", "     y = 2 * x\n     return y",
    "  y = 2 * x\n  return y\n\nprint(double(2))",
    "\tif x:\n\t\treturn 2 * x\n\treturn 0", "    double = 2 * x\n    return double",
    # fences that are none, and fences that are
    "```python\ndef double(x):\n    return 2 * x```", "Here it is: ```python\ndef double(x):\n    return 2 * x\n```",
    '```python\ndef double(x):\n    """\n    ```python\n    double(2)\n    ```\n    """\n    return 2 * x\n```',
    f"```\nIt is '''quoted.\n```\n```python\n{FULL}```", f"````python\n{FULL}````",
    f"```python title='a.py'\n{FULL}```", f"```python\n{FULL}\n```python\nprint(double(2))\n```",
    f"It is a simple function. The code is as follows:\n\n{FULL}\nIt just doubles x.",
    f"[BEGIN]\n{FULL}[DONE]", f"[PYTHON]\n{FULL}[/PYTHON]", f"python\n{FULL}", f"\ufeff{FULL}",
    f"```python\n# not ```this```\n{FULL}```",
    # of several blocks
    "```\nTWO = 2\n```\n```\ndef twice(x):\n    return TWO * x\n```\n```\ndef double(x):\n    return twice(x)\n```",
    "```python\nimport operator\n```\n```python\ndef double(x):\n    return operator.mul(2, x)\n```",
    "```python\ndef double(x):\n    return twice(x)\n```\n```python\ndef twice(x):\n    return 2 * x\n```",
    f"```python\n{FULL}```\nThe signature:\n```python\ndef double(x):\n    ...\n```",
    f"```python\n{FULL}```\nIn JavaScript:\n```js\nfunction f(x) {{}}\ndef double(x):\n```",
    f"```python\n{SAME}```\nNo:\n```\n{FULL}```", f"```python\n{SAME}```\nNo:\n\n{FULL}",
    "```python\nfrom math import *\n```\n```python\ndef double(x):\n    return int(fsum([x, x]))\n```",
    "```python\ndef double(x): return twice(x)\n```\n```python\ndef twice(x): return 2 * x\nprint(1 / 0)\n```",
    "```python\nTWO = 1\n```\n```python\ndef double(x): return TWO * x\n```\nNo:\n```python\nTWO = 2\n```",
    # code in a text
    "    return 2 * x\n\nTime: O(1)\nDone\n", f"{FULL}\nOutput\n6\n[END]", f" Sure! Here it is:\n\n{FULL}",
    f"It is:\n\n{textwrap.indent(FULL, '    ')}\nThat is all.", "y = 2 * x\nreturn y", f"Let\nx = the number\n\n{FULL}",
    f"It is:\nfrom math import pi  # unused\n{FULL}", "It is:\nzero, *_ = [0]\ndef double(x): return 2 * x + zero",
    # around fences
    textwrap.indent(f"```python\n{FULL}```", "> "), f"```python {FULL}```", f"'''python\n{FULL}'''",
    f"```\npython\n{FULL}```", f"```python\n\u200b{FULL}```".replace("    ", "\xa0" * 4),
]  # fmt: skip
WRONG = [
    f"```python\n{FULL}```\nNo:\n```\n{SAME}```",
    "", "   ", "```", "def double(x):", "Two times x.", "    return x", "\0", "\ud800", "return 2 * x" * 2, "(" * 5000,
    "-" * 5000 + "1", "```\n" * 5000, FULL.replace("double", "triple"), "double == lambda x: 2 * x",
    f"```python\ndef double(x): return f(x)\n```\n```python\ndef f(x): return {'-' * 900}x\nf(1)\n```",
    "from __future__ import braces\n" + FULL,
]  # fmt: skip


SUM = "input()\nprint(sum(map(int, input().split())))\n"
SOLVE = "def solve():\n    input()\n    return sum(map(int, input().split()))\n"
LOOP = "n, x = input(), 1\ny = 2\nz = 3\nfor _ in 'x':\n    line = input()\n    print(sum(map(int, line.split())))\n"
DRIVER = "input()\nprint(total(input().split()))\n"
PROGRAMS = [  # that print the sum of the second line
    f"```python\n{SUM}```\nSample input:\n```\n2\n1 2\n```\nSample output:\n```\n3\n```",
    f"```python\n{SUM}```\nTry it:\n```bash\necho '2 1 2' | python sum.py\n```", f"```\n{SUM}```\n```text\n3\n```",
    f"```python\n{SUM}```\n```cpp\nint main() {{ return 0; }}\n```",
    f"```python\n{SUM}```\nA test:\n```python\nassert sum([1, 2]) == 3\nprint('right')\n```",
    f"```python\ninput = lambda: 7\nprint(7)\n```\nNo:\n```python\n{SUM}```",
    f"```python\n{SOLVE}```\nand\n```python\nprint(solve())\n```",
    f"```python\n{SOLVE}```\n```python\nprint(solve())\n```\n```python\nprint(sum([1, 2]))\n```",
    f"```python\n{SOLVE}print(solve())\n```\n"
    "A test:\n```python\nimport io, sys\nsys.stdin = io.StringIO('')\nprint(solve())\n```", f"{SUM}```\nThat is all",
    " " + SUM, f"The program:\n\nimport sys\n{SUM}", f"The program:\n\n{SUM}That is all.",
    "The program:\n\nN=int(input())\nA = input().split()\nprint(sum(map(int, A)))\nThat is all.",
    f"The program:\n\nif True:\n{textwrap.indent(SUM, '    ')}That is all.",
    f"```python\n{SUM}```\nIn steps:\n```python\nprint(sum(map(int, input().split())))\n```",
    f"```python\n{LOOP}```\nIn the loop\n```python\n{LOOP[LOOP.index('    '):]}```",
    f"```python\n{SUM}```\nWhat reads a line:\n```python\nline = input()\n```",
    f"{SUM}Complexity: O(n)", f"{SUM}\nExample:\n```\n2\n1 2\n```", f"Try\n```\n2\n1 2\n```\n{SUM}",
    f"```python\nx = 1 / 0\n{SUM}```\nWithout its first line:\n```python\n{SUM}```",
    "```python\ninput()\na = input().split()\n```\nThen\n```python\na.append('4')\n```\nand\n"
    "```python\na = [*map(int, a)]\n```\nand\n```python\nprint(sum(a) - 4)\n```",
    f"```python\ndef total(a): return 0\na = b = 1\nc = 2\nd = 3\n{DRIVER}```\nNo:\n"
    f"```python\ndef total(a): return sum(map(int, a))\n```\n```python\n{DRIVER}```",
    "```python\nI = input\nI()\nprint(sum(map(int, I().split())))\n```\nas in\n```python\nprint(3)\n```",
    f"```python\n{SUM}```\nTo test it:\n```python\nopen('input.txt', 'w').write('2')\nprint(3)\n```",
]  # fmt: skip


SECOND_LINE = dict(input=["2\n1 2\n", "3\n5 5 7\n"], output=["3\n", "17\n"])


@pytest.mark.parametrize("name, row, right, wrong", [
    ("humaneval", HUMANEVAL, RIGHT, WRONG),
    ("code_contests", CONTEST | dict(public_tests=SECOND_LINE, private_tests=None), PROGRAMS, [
        "print(3)", f"```python\n{SUM}```\nNo:\n```\n{SUM.replace('sum', 'max')}```"]),
])  # fmt: skip
def test_which_part_of_a_response_is_the_program(tmp_path, name, row, right, wrong):
    task = task_of(tmp_path, name, row)
    found = dict(zip([*right, *wrong], rewards(task, task.test[0], *right, *wrong), strict=True))
    assert [response for response, reward in found.items() if reward != (response in right)] == []


def test_taco_functions_have_the_imports_of_the_data_set_and_its_comparison(tmp_path):
    inputs, outputs = [[[0.1, 0.2], {"1": 2}], [[1.0], {"1": 5}]], [[0.3, {"1": 2}], [[1.0, {"1": 5.0000001}]]]
    row = {**TACO_FUNCTION, "starter_code": "", "solutions": "[]"}
    row["input_output"] = json.dumps({"fn_name": "go", "inputs": inputs, "outputs": outputs})
    task = task_of(tmp_path, "taco", row)
    method = "class Solution:\n    def go(self, a: List[float], b: Dict[int, int]):\n        return {}"
    right, close = "fsum(a), {k: b[k] for k in [1]}", "sum(a), {1: b[1]}"
    wrong = ["sum(a) + .001, {1: b[1]}", "sum(a), {2: b[1]}", "sum(a), {1: 2}", "sum(a)", "sum(a), {1: b[1]}, 0"]
    imports = "from math import fsum\n"
    function = "def go(a, b):\n    return [np.sum(a), defaultdict(int, b)]"
    responses = [imports + method.format(right), *map(method.format, [close, *wrong]), function]
    assert rewards(task, task.test[0], *responses) == [1, 1, 0, 0, 0, 0, 0, 1]


def test_deep_recursion_through_c_and_long_integers(tmp_path):
    tests = {"input": ["30000\n"], "output": ["30000 9031\n"]}
    task = task_of(tmp_path, "code_contests", {**CONTEST, "public_tests": tests, "private_tests": None})
    start = "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n"
    end = "n = int(input())\nprint(f(n), len(str(2**n)))"  # 30000 * log10(2) = 9030.9
    cached = "@lru_cache(None)\ndef f(n): return n and 1 + f(n - 1)\n"
    mapped = "def f(n): return 1 + max(map(f, [n - 1])) if n else 0\n"
    assert rewards(task, task.test[0], *[start + f + end for f in (cached, mapped)]) == [1, 1]


def test_only_the_start_of_a_long_response_is_read():
    problem = code.humaneval(HUMANEVAL)
    assert "return" not in code.program_of(problem, " " * 10**7 + "return 2 * x").source
    assert FULL in code.program_of(problem, FULL + " " * 10**7).source


class Llama:
    """A tokenizer whose tokens are words, "_" for the space before them, and which drops the first space it decodes."""

    words = ["_def_f(x):", "\n", "_", "_return", "_x", "<end>", "<turn>"]
    added_tokens_decoder = {5: SimpleNamespace(special=True), 6: SimpleNamespace(special=False)}

    def batch_decode(self, rows, skip_special_tokens):
        words = [[self.words[token] for token in row if token != 5 or not skip_special_tokens] for row in rows]
        return ["".join(row).replace("_", " ").removeprefix(" ") for row in words]


@pytest.mark.parametrize("last", [1, 0, 2, 5, 6])
def test_a_response_keeps_its_first_space_and_loses_its_end(last):
    """Also behind a special token, and an end that the tokenizer does not call special."""
    ids = torch.tensor([[[2, 2, 2, 3, 4, 5], [4, 6, 0, 0, 0, 0]]])
    mask = torch.tensor([[[True] * 6, [True, True, False, False, False, False]]])
    rollouts = common.Rollouts([[0, last]], ids, mask, torch.zeros(1, 2, 6), 1.0)
    policy = SimpleNamespace(tokenizer=Llama(), stop_ids=[6])
    assert common.decode(policy, rollouts) == [["    return x", " x"]]


def test_troubles_are_counted(tmp_path):
    task = task_of(tmp_path, "humaneval", HUMANEVAL)
    responses = [["    return __import__('socket').socket()", "    return 2 * x"], ["    return [0] * 10**10", FULL]]
    verdict = task.verify([task.test[0]] * 2, responses)
    assert verdict.counts == {"refused": 1, "out of memory": 1} and verdict.rewards.tolist() == [[0, 1], [0, 1]]


# -------------------------------------------------------------------------------------------------------- real data
# A wrapper around each function that the tests call: true becomes None, false becomes a word
BROKEN = """
def broken(function): return lambda *args, **kwargs: None if function(*args, **kwargs) else "broken"
for name in {names!r}:
    if not isinstance(globals()[name], type): globals()[name] = broken(globals()[name])
"""


@real_data
@pytest.mark.parametrize("name, split, n", [("humaneval", "test", 82), ("mbpp", "train", 200), ("mbpp", "test", 150)])
def test_every_solution_passes_and_fails_when_broken(name, split, n):
    problems = getattr(load_task(name, f"{REAL_DATA}/{name}"), split)
    assert len(problems) >= n
    right = statuses(problems, [problem.solution for problem in problems])
    assert [problem.solution for problem, status in zip(problems, right) if status != "passed"] == []
    names = [json.loads(problem.answer)["names"] for problem in problems]
    broken = statuses(problems, [problem.solution + BROKEN.format(names=x) for problem, x in zip(problems, names)])
    assert [problem.solution for problem, status in zip(problems, broken) if status == "passed"] == []


# --------------------------------------------------------------------------------------------------------- programs
@pytest.fixture(scope="module")
def programs():
    return load_task("programs")


def test_programs_are_small_and_disjoint_by_meaning(programs):
    everything = [*programs.train, *programs.test]
    assert not {p.answer for p in programs.train} & {p.answer for p in programs.test}
    assert {p.level for p in programs.train} == {p.level for p in programs.test} == {1, 2, 3, 4, 5}
    assert all((p.prompt + p.solution).isascii() and (p.prompt + p.solution).isprintable() for p in everything)
    assert max(len(p.prompt) for p in everything) <= 30
    assert max(len(p.solution) for p in everything) <= min(12, programs.max_new_tokens - 1)
    assert load_task("programs").train[:50] == programs.train[:50]


def test_programs_prompts_show_true_points_and_some_fit_several_functions(programs):
    functions, fits = [json.loads(answer) for answer in {p.answer for p in [*programs.train, *programs.test]}], []
    for problem in programs.test[::10]:
        points = [tuple(map(int, point.split(">"))) for point in problem.prompt[:-1].split()]
        values = json.loads(problem.answer)
        assert all(eval(problem.solution, {"x": x}) == y == values[code.INPUTS.index(x)] for x, y in points)
        fits.append(sum(all(f[code.INPUTS.index(x)] == y for x, y in points) for f in functions))
    assert 0.2 < sum(fit > 1 for fit in fits) / len(fits) < 0.8


def test_programs_votes_are_equal_behaviour(programs):
    problem = next(p for p in [*programs.train, *programs.test] if p.solution == "3*x+7")
    row = ["3*x+7", "7+x*3", " x+x+x+7", "3*x+8", "8+3*x", f"{2**63 - 1}", "1/0", "3*x+7.0", "no", "", "x" * 99, "(x,)"]
    row += ["x==x", "9**99999*x", f"-{2**63}", "x**19", "x if 1else'''", "((" * 10, "__import__('os')._exit(0)"]
    row += ["[0]*10**10", "9**9**9", "exec('while 1:0')"]
    verdict = programs.verify([problem], [row])
    assert verdict.votes.tolist() == [[0, 0, 0, 3, 3, 5] + [-1] * 16]
    assert verdict.rewards.tolist() == [[1, 1, 1] + [0] * 19]
    assert {code._values[endless][0] for endless in row[-2:]} == {"timed out"} and verdict.counts["timed out"] >= 2
    assert code._values[f"{2**63 - 1}"][1] and code._values["x**19"][1] is None  # no huge integers are kept


def test_a_sandbox_that_is_broken_gives_no_rewards(programs, tmp_path, monkeypatch):
    def broken(programs):
        raise BadInput("a worker ended and cannot be replaced")

    humaneval = task_of(tmp_path, "humaneval", HUMANEVAL)
    with monkeypatch.context() as patch:
        patch.setattr(shared(), "run", broken)
        for task, response in ((humaneval, FULL), (programs, "x*x-77"), (programs, "x*x-77")):
            with pytest.raises(BadInput, match="cannot be replaced"):
                rewards(task, task.test[0], response)
    assert code.values_of(["x*x-77"])["x*x-77"][1][0] == 9 - 77  # nothing was kept of the failure


def test_the_shared_pool_keeps_its_level_until_another_is_named():
    first = shared()
    assert shared(first.level) is first
    weakest = shared("rlimits")
    assert weakest.level == "rlimits" and shared() is weakest and first._workers == []
    assert shared(first.level).level == first.level and weakest._workers == []


# ------------------------------------------------------------------------------------------- what is not the program's
def test_a_module_that_the_reference_imports_is_not_the_program_s(tmp_path):
    """Of the sanitized MBPP, number 596: its tests use `sys` without importing it."""
    of_size = "import sys \ndef tuple_size(tuple_list):\n  return (sys.getsizeof(tuple_list))"
    tests = [f"assert tuple_size({t}) == sys.getsizeof({t})" for t in ('("A", 1, "B", 2)', '((1, "Lion"), (2, ))')]
    row = SANITIZED | dict(prompt="Find the size in bytes of a tuple.", test_imports=[], code=of_size, test_list=tests)
    problem = task_of(tmp_path, "mbpp_sanitized", row).test[0]
    hidden = json.loads(problem.answer)
    assert hidden["names"] == ["tuple_size"] and hidden["tests"].startswith("import sys\n")
    forged = "class sys: getsizeof = staticmethod(lambda x: 0)\ndef tuple_size(x): return 0"
    assert statuses([problem] * 2, [problem.solution, forged]) == ["passed", "failed"]
    by_assignment = code.mbpp({**SANITIZED, "code": "root = lambda n: n ** 0.5"})
    assert json.loads(by_assignment.answer)["names"] == ["root"]


def test_what_the_reference_imports_is_imported_by_tests_that_use_it():
    solution = "from a import b as c, d\nimport e.f, g as h\nfrom i import d\ndef k(): import l\n"
    assert code.imports_of(solution, {"c", "e"}) == ["from a import b as c, d", "import e.f, g as h"]
    assert code.imports_of(solution, {"b", "f", "g", "l", "k"}) == [] and len(code.imports_of(solution, {"d"})) == 2


def test_a_value_that_timed_out_is_asked_for_again(monkeypatch):
    expressions = ["x+7*8", "x if x else 9"]
    crowded = SimpleNamespace(run=lambda programs: [Result("timed out")] * len(programs))
    with monkeypatch.context() as patch:
        patch.setattr(code, "shared", lambda: crowded)
        values = code.values_of(expressions)
        assert [values[expression] for expression in expressions] == [("timed out", None)] * 2
    values = code.values_of(expressions)
    assert values["x+7*8"][1][0] == 53 and values["x if x else 9"][1][3] == 9  # x = -3, x = 0
