"""Programs judged by hidden tests: `humaneval`, `mbpp`, `mbpp_sanitized`, `code_contests`, `taco`, and `programs`.

The sandbox (`verifiers.sandbox`) runs a response; the reward is 1 when all tests pass and 0 otherwise.

**What counts as the program.** One rule for all tasks but `programs`:
1. Candidates are the blocks between code fences (backticks or tildes, indented or not) and the code in the text around
   them: from a line that looks like code up to the first that does not parse, remarks at the end aside ("Time: O(n)").
   For HumanEval the text before the first fence is one if it continues the prompt.
2. For a function, a candidate that defines it (`def name` or `name =`; a signature without a body counts less) goes
   first, then one that parses; for standard input, one that reads it, prints, calls something outside of definitions,
   and is no quotation of another. The last of these counts. Where none does so, a python tag goes before no tag.
3. Candidates that define what it uses, or what else the tests ask for, are put in front. For HumanEval the prompt is
   as well: a continuation, moved to its indentation, a whole function, and a repeated prompt all work.
4. Everything from the first line that does not parse is dropped, and all after the response's first 50 000 characters.

TACO's functions have the imports of the data set's own harness; its dicts compare by the text of their keys, floats to
6 digits. Changes of a function's arguments are not looked at. Rows have the columns of the Hugging Face data sets.
"""

import ast
import builtins
import dataclasses
import itertools
import json
import random
import re
import sys
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from . import BadInput, Problem, Task, Verdict, arithmetic, one_line
from .rows import load_rows
from .sandbox.pool import Program, shared

HUB = {
    "humaneval": ("openai/openai_humaneval", None),  # `check(candidate)`; a test split only, so nothing to train on
    "mbpp": ("google-research-datasets/mbpp", "full"),  # asserts; `text`, `test_setup_code`
    "mbpp_sanitized": ("google-research-datasets/mbpp", "sanitized"),  # asserts; `prompt`, `test_imports`
    "code_contests": ("deepmind/code_contests", None),  # standard input; public, private and generated tests
    "taco": ("BAAI/TACO", None),  # standard input, or with `fn_name` a function; `input_output` is a string of JSON
}
MAX_RESPONSE_CHARS = 50_000  # of a response; the rest is not read
MAX_BLOCKS = 50  # the last ones
MAX_CASES = 20  # cases judged per problem, the first ones: some problems come with hundreds
LEVELS = {"EASY": 1, "MEDIUM": 2, "MEDIUM_HARD": 3, "HARD": 4, "VERY_HARD": 5}  # of TACO


def load(name: str, data: str | None = None) -> Task:
    """The task. Raises BadInput for data that cannot be read as rows of the task's schema."""
    if name == "programs":
        return load_programs(name)
    train = [] if name == "humaneval" else problems_of(name, "train", data)
    test = problems_of(name, "test", data)
    long, prompt = name in ("code_contests", "taco"), "{prompt}" if name == "humaneval" else "{prompt}\n"
    ask, tokens = "Write the program in Python, in one code block.", 1024 if long else 512
    return Task(name, train, test, verify, template=prompt, instruction=ask, max_new_tokens=tokens)


def problems_of(name: str, split: str, data: str | None) -> list[Problem]:
    """The problems of one split. Rows that cannot be judged are left out, and counted on stderr."""
    (hub_id, config), problems = HUB[name], []
    read = {"humaneval": humaneval, "code_contests": code_contest, "taco": taco}.get(name, mbpp)
    rows = load_rows(hub_id, split, data, config)
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(read(row))
        except Exception as error:  # rows of another shape raise many types
            why = f"row {number}: {one_line(error)}; {hub_id} has the schema"
            raise BadInput(f"{name}, split {split!r}, {why}") from error
    if left_out := problems.count(None):
        why = "no tests, or named files for input and output"
        print(f"{name}: {left_out} of {len(rows)} rows of split {split!r} left out: {why}", file=sys.stderr)
    return [problem for problem in problems if problem is not None]


def humaneval(row: dict) -> Problem:
    """A row with `prompt`, `entry_point`, `canonical_solution`, `test`; some tests use the prompt's own functions."""
    prompt, name = row["prompt"], row["entry_point"]
    tests = f"{row['test']}\ncheck({name})"
    setup = prompt if names_in(tree(tests))[1] & (names_defined(prompt) - {name}) else ""
    return problem_of(prompt, row["canonical_solution"], tests, names=[name], setup=setup, prefix=prompt)


def mbpp(row: dict) -> Problem:
    """A row of the full (`text`, `test_setup_code`) or sanitized (`prompt`, `test_imports`) schema. The first assert is
    part of the prompt, since it tells the function's name; the others stay hidden."""
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    solution, tests = row["code"].replace("\r\n", "\n"), "\n".join([setup, *row["test_list"]])
    tests = "\n".join([*imports_of(solution, names_in(tree(tests))[1]), tests])
    bound, used = names_in(tree(tests))
    names = used & names_defined(solution) | used - bound - BUILTINS  # the latter nobody else defines
    text = row["text"] if "text" in row else row["prompt"]
    prompt = text + f"\nYour code should pass this test:\n{row['test_list'][0]}"
    return problem_of(prompt, solution, tests, sorted(names))


def code_contest(row: dict) -> Problem | None:
    """A row of CodeContests; None if it reads or writes named files, or has no test."""
    tests = [row[key] or {} for key in ("public_tests", "private_tests", "generated_tests")]
    cases = [pair for group in tests for pair in zip(group.get("input", []), group.get("output", []))]
    if row.get("input_file") or row.get("output_file") or not cases:
        return None
    solutions = row.get("solutions") or {}
    languages, texts = solutions.get("language", []), solutions.get("solution", [])
    solution = next((text for language, text in zip(languages, texts) if language == 3), "")  # Python 3
    return problem_of(row["description"], solution, cases=cases[:MAX_CASES])


def taco(row: dict) -> Problem | None:
    """A row of TACO, whose fields are strings of JSON; None if it has no test."""
    texts = (row["input_output"], row.get("solutions"))
    read = json.JSONDecoder(object_hook=with_integer_keys).decode
    tests, solutions = (read(text) if isinstance(text, str) and text.strip() else text for text in texts)
    tests, solution = tests or {}, solutions[0] if solutions else ""
    prompt = "\n".join(filter(None, [row["question"], row.get("starter_code")]))
    pairs = list(zip(tests.get("inputs", []), tests.get("outputs", [])))[:MAX_CASES]
    name, level = tests.get("fn_name"), LEVELS.get(row.get("difficulty"))
    if not pairs:
        return None
    if name is None:
        pairs = [["\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in pair] for pair in pairs]
        return problem_of(prompt, solution, cases=pairs, level=level)
    tests = FUNCTION_TESTS.format(pairs=pairs, name=name)
    return problem_of(prompt, solution, tests, [name, "Solution"], level=level, imports=TACO_IMPORTS)


def with_integer_keys(row: dict) -> dict:
    """A dict with the integer keys that it had before it was written as JSON."""
    return {int(key): row[key] for key in row} if all(re.fullmatch("-?[0-9]+", key) for key in row) else row


# as in the data set's own harness and on LeetCode
TACO_IMPORTS = """
import bisect, collections, fractions, functools, heapq, itertools, math, random, re, string, sys, time
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, cos, exp, fabs, floor, gcd, inf, log, log2, sin, sqrt, tan
from typing import *
"""
# TACO wraps some expected values in a list of one, knows no tuples and, as JSON, only texts as keys
FUNCTION_TESTS = """
def plain(value):
    if isinstance(value, dict):
        return ["dict", *sorted([str(key), plain(item)] for key, item in value.items())]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
def same(got, wanted):
    if isinstance(wanted, list) and isinstance(got, list):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    near = type(wanted) is float and type(got) in (int, float)
    return got == wanted or near and abs(got - wanted) <= 1e-6 * max(1, abs(wanted))
try:
    function = Solution().{name}
except (NameError, AttributeError):
    function = {name}
for given, wanted in {pairs!r}:
    got, wanted = plain(function(*given)), plain(wanted)
    assert same(got, wanted) or same([got], wanted)
"""


def problem_of(
    prompt: str, solution: str, tests: str = "", names=(), setup="", prefix="", cases=(), level=None, imports=""
) -> Problem:
    """A problem whose `answer` is JSON of what `program_of` needs to judge a response. Raises TypeError or ValueError
    for what is no text, an empty prompt, and a lone surrogate (UnicodeEncodeError), which no tokenizer reads."""
    if not all(isinstance(text, str) for text in (prompt, solution, *itertools.chain(*cases))):
        raise TypeError("the prompt, the solution, inputs and outputs must be texts")
    if not prompt.encode().strip():
        raise ValueError("empty prompt")
    hidden = dict(tests=tests, names=[*names], setup=setup, prefix=prefix, cases=[*cases], imports=imports)
    return Problem(prompt, json.dumps(hidden), solution, level)


def imports_of(solution: str, names: set[str]) -> list[str]:
    """The top-level imports by which the reference solution binds some of these names. Tests that use the names run the
    imports themselves, since a program could bind the names to anything."""
    nodes = [node for node in tree(solution).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    bound = [{(alias.asname or alias.name).partition(".")[0] for alias in node.names} for node in nodes]
    return [ast.unparse(node) for node, its in zip(nodes, bound) if its & names]


def names_defined(source: str) -> set[str]:
    """The functions and classes that a source defines at top level."""
    return {node.name for node in tree(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def tree(source: str) -> ast.Module:
    """The syntax tree of a data set's code, without Python's remarks on its style."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def program_of(problem: Problem, response: str) -> Program:
    """What the sandbox runs for a response; the rule is at the top of this file."""
    hidden = json.loads(problem.answer)
    source = source_in(response[:MAX_RESPONSE_CHARS], hidden["names"], hidden["prefix"])
    imports = hidden["imports"] + ("import numpy as np\n" if hidden["imports"] and "np." in source else "")
    if imports or hidden["prefix"]:
        future = r"(?m)^from __future__ import .*\n"
        source = "".join([*re.findall(future, source), imports, hidden["prefix"], re.sub(future, "", source)])
    return Program(source, hidden["tests"], tuple(hidden["names"]), hidden["setup"], (*map(tuple, hidden["cases"]),))


FENCE = re.compile(r"(.*?)(?<![`~])(`{3,}|~{3,})(?![`~])[ \t]*([\w+#.{}-]*)([^`\n]*)\n?")
# a fence with code in its line
ON_FENCE = re.compile(r"(?m)^(```\w*)[ \t]+((?:def|class|from|import) .*?|\w+ = .*?|print\(.*?)(```)?$")
LINES = re.compile(r".*\n|.+")  # as Python counts them: a form feed ends none
SPACES = {0xFEFF: None, 0x200B: None, 0xA0: " "}  # no-break and without width, which Python refuses
PYTHON = re.compile(r"(?:\W*lang(?:uage)?-)?\W*(?:python|py|pypy)[\d.]*\W*", re.IGNORECASE)
READS_INPUT = re.compile(r"\binput\s*\(|=\s*input\b|\bstdin\b(?!\s*=)|\bopen\s*\(\s*(?:0|['\"]/dev/stdin)|\bos\.read\(")
BUILTINS = set(dir(builtins))
WHOLE = (ast.Return, ast.Yield, ast.Lambda)  # what a mere signature lacks
ACTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)  # an expression without these does nothing
CODE_LINE = re.compile(
    r"[ \t]*(?:@\w|(?:def|class|import|from|for|while|if|with|try|match|return)\b|[\w*(\[][^=(]*(?:=(?!=)|\(|:.*=))"
)
MAX_PARSED = 300_000  # characters of a response's text that are parsed in search of code


def source_in(response: str, names: Sequence[str], prefix: str) -> str:
    """The program in a response, by the rule at the top: it defines one of `names`, behind `prefix`, or reads input."""
    name = "|".join(map(re.escape, names)) or "(?!)"
    defined = re.compile(rf"(?m)^([ \t]*(def|class)[ \t]+({name})\b|({name})[ \t]*(:[^=\n]*)?=(?!=))")
    response = re.split(r"(?m)^\[DONE\]", response.translate(SPACES), maxsplit=1)[0]  # it ends MBPP's own examples
    response = re.sub(r"(?m)^>(?!>) ?", "", response) if re.search("(?m)^> ?```", response) else response
    response = ON_FENCE.sub(lambda it: "\n".join(filter(None, it.groups())), response)
    parts = blocks_of(re.sub(r"\A(?:[ \t]*\n)+", "", response))
    head, blocks = parts[0][1], []
    if prefix and not defined.search(head):
        body = continuation(head, prefix)
        if body := code_in_front(prefix + body)[0][len(prefix) :]:
            blocks, parts = [("", body)], parts[1:]
    for tag, text in parts:
        own = code_in(text) if tag is None else [re.sub(r"\A\s*python3?\s*\n", "", text)]
        blocks += [(tag or "", code) for code in own]
    blocks = blocks[-MAX_BLOCKS:] or [("", head)]
    trees = [parsed(text) for _, text in blocks]
    bound, used = zip(*map(names_in, trees))
    changed = [changed_in(syntax) for syntax in trees]
    free = [used[i] - bound[i] - BUILTINS | changed[i] for i in range(len(blocks))]

    def with_needed(last: int) -> list[int]:
        """A block behind the others that define what it uses: later ones, then earlier ones, the nearest first."""
        found, missing = [last], free[last] | {*names} - bound[last]
        for number in [*range(last + 1, len(blocks)), *reversed(range(last))]:
            if missing & (bound[number] | changed[number]) or "*" in bound[number] and not is_run(trees[number]):
                found, missing = [number, *found], missing - bound[number] | free[number]
        return found

    def rank(number: int) -> tuple:
        (tag, text), syntax = blocks[number], trees[number]
        language = 2 if PYTHON.fullmatch(tag) else not tag
        if names:
            whole = syntax is None or any(isinstance(node, WHOLE) for node in ast.walk(syntax))
            defines = bool(defined.search(text)) * (1 + whole)
            body = prefix and text[:1] in (" ", "\t")
            return defines, body, syntax is not None, not (defines or body) and language, number
        needed = [blocks[i][1] for i in with_needed(number)]
        run = is_run(syntax) and not is_quoted(number, needed) and any("print" in x or "write" in x for x in needed)
        reads = [run and bool(READS_INPUT.search(part)) for part in needed]
        return reads[-1], any(reads), not any(reads) and language, run, number

    def is_quoted(number: int, needed: list[str]) -> bool:
        """Whether a block repeats a part of another. It corrects an earlier one if it has several lines, half of that
        one's or more, or if what it needs stands in blocks beside that one."""
        text, size = blocks[number][1].strip(), blocks[number][1].strip().count("\n")
        larger = [(i, x.strip().count("\n")) for i, (_, x) in enumerate(blocks) if text in x and text != x.strip()]
        larger = [(i, lines) for i, lines in larger if len(needed) == 1 or blocks[i][1] in needed]
        return any(i > number or size == 0 or 2 * size + 1 < lines for i, lines in larger)

    *helpers, chosen = with_needed(max(range(len(blocks)), key=rank))
    texts = [(textwrap.dedent(blocks[i][1]), i > chosen and is_run(trees[i]) and trees[i]) for i in helpers]
    texts = [definitions(text, syntax) if syntax else text for text, syntax in texts]
    helpers, source = "".join(f"{text}\n" for text in texts), blocks[chosen][1]
    if prefix and not defined.search(source):
        return continuation(source, prefix) + ("\n" + helpers if helpers else "")
    source = textwrap.dedent(source)
    return helpers + (source.lstrip() if source.lstrip("\n")[:1] in (" ", "\t") else source)


def blocks_of(response: str, strings: bool = True) -> list[tuple[str | None, str]]:
    """Tag and text of each code block and, with the tag None, of the text around them, the text in front first. A fence
    begins a line, or ends it: then it closes a block or, with a tag, opens one. Fences in triple-quoted strings, in
    blocks and in the text in front, are text."""
    blocks, fence, quotes = [(None, [])], "", 0
    for line in response.splitlines(keepends=True):
        mark = FENCE.fullmatch(line) if "```" in line or "~~~" in line else None
        before, marks, tag, rest = mark.groups() if mark else ("", "", "", "")
        inside = strings and quotes % 2 or not marks.startswith(fence or ("`", "~"))
        if inside or before.strip() and (rest.strip() or fence and tag or marks in before):
            before, marks = line, ""
        if before.strip(" \t"):
            blocks[-1][1].append(before)
            quotes += (before.count('"""') + before.count("'''")) * bool(fence or len(blocks) == 1)
        if marks:
            fence, quotes = marks if not fence or tag and not rest.strip() else "", 0
            blocks += [(tag if fence else None, [])]
    if strings and quotes % 2:
        return blocks_of(response, strings=False)
    return [(tag, "".join(lines)) for tag, lines in blocks]


def code_in(text: str) -> list[str]:
    """The pieces of code in a text without fences: each goes from a line that looks like code (CODE_LINE), or the lines
    as far indented as it, up to the first that does not parse."""
    lines, found, i, left = LINES.findall(text), [], 0, MAX_PARSED
    while i < len(lines):
        code = ""
        if left > 0 and CODE_LINE.match(lines[i]):
            indent = re.match(r"[ \t]*", lines[i])[0]
            if i == 0 and lines[1:] and lines[1].strip() and not lines[1].startswith(indent):  # decoding left a space
                lines[0], indent = lines[0].lstrip(), ""
            rest = itertools.takewhile(lambda line: not line.strip() or line.startswith(indent), lines[i:])
            code, left = code_in_front("".join(rest), left)
            found += [code] if code else []
        i += code.count("\n") or 1
    return found


def code_in_front(text: str, left: int = MAX_PARSED) -> tuple[str, int]:
    """The lines of a text up to the first that does not parse, remarks at their end aside, "" if they do nothing; and
    what is left of the characters that may be parsed for them."""
    lines, plain = LINES.findall(text), LINES.findall(textwrap.dedent(text))
    while plain and left > 0:
        left -= sum(map(len, plain))
        try:
            body = tree("".join(plain)).body
        except SyntaxError as error:
            plain = plain[: max(min(error.lineno or 1, len(plain)) - 1, 0)]
            continue
        except (ValueError, MemoryError, RecursionError, SystemError):
            break
        while body and is_remark(body[-1]):
            plain = plain[: body.pop().lineno - 1]
        return "".join(lines[: len(plain)]) if body else "", left
    return "", left


def is_remark(statement: ast.stmt) -> bool:
    """Whether a statement does nothing, as "Time: O(n)", "Output", and "[END]" behind a program do."""
    if isinstance(statement, ast.Expr):
        return not any(isinstance(node, ACTS) for node in ast.walk(statement))
    return isinstance(statement, ast.AnnAssign) and statement.value is None


def definitions(source: str, syntax: ast.Module) -> str:
    """The lines of a program that are its imports, functions and classes."""
    kinds, lines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef), LINES.findall(source)
    nodes = [node for node in syntax.body if isinstance(node, kinds)]
    first = [min(x.lineno for x in (node, *getattr(node, "decorator_list", []))) for node in nodes]
    return "".join("".join(lines[start - 1 : node.end_lineno]) for start, node in zip(first, nodes))


def continuation(source: str, prefix: str) -> str:
    """A response that continues the prompt, at the prompt's indentation. Decoding may have lost the first space, or all
    of them; a body with another indentation is moved as a whole."""
    source, last = source.lstrip("\n"), prefix.rstrip().rpartition("\n")[2]
    if last[:1] == "\t":
        return source
    source = source.expandtabs(4) if source[:1] == "\t" else source
    width, wanted = (len(line) - len(line.lstrip(" ")) for line in (source, last))
    whole = re.search(rf"\n {{{width}}}\S" if width else r"(?m)^(?:return|yield)\b", source)  # else its first line
    return re.sub(rf"(?m)^ {{{width}}}", " " * (wanted or 4), source, count=not whole)


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a model's code; None without one."""
    try:
        return tree(textwrap.dedent(source))
    except (SyntaxError, ValueError, MemoryError, RecursionError, SystemError):
        return None


def names_in(syntax: ast.AST | None) -> tuple[set[str], set[str]]:
    """The names that a program binds, and all names in it."""
    nodes = list(ast.walk(syntax)) if syntax else []
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {value for node in nodes for key in ("name", "asname", "arg") if (value := getattr(node, key, None))}
    return bound, {node.id for node in names}


def changed_in(syntax: ast.Module | None) -> set[str]:
    """The names that a program changes without having made them: `s = s * 2`, `s += 1`, `a.sort()`."""
    made, changed = set(), set()
    for node in syntax.body if syntax else []:
        bound, used = names_in(node)
        if isinstance(node, ast.Assign):
            used = names_in(node.value)[1]
        elif isinstance(node, ast.Expr):
            bound = {
                x.value.id for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name)
            }
        elif not isinstance(node, ast.AugAssign):
            used = set()
        changed |= bound & used - made
        made |= bound
    return changed


def is_run(syntax: ast.Module | None) -> bool:
    """Whether a program is no bare data or definition: a statement outside of definitions calls something."""
    own = [node for node in syntax.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))] if syntax else []
    return any(isinstance(node, ast.Call) for statement in own for node in ast.walk(statement))


def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
    """1 where all hidden tests pass; see `Task.verify`. Programs have no final answer to vote with: all votes are -1.
    counts: see `troubles`. Raises BadInput where the sandbox is to blame, not the programs."""
    pairs = [[(problem, response) for response in row] for problem, row in zip(problems, responses)]
    unique = list(dict.fromkeys(pair for row in pairs for pair in row))
    results = dict(zip(unique, shared().run([program_of(*pair) for pair in unique])))
    of_rows = [[results[pair] for pair in row] for row in pairs]
    rewards = torch.tensor([[float(result.passed) for result in row] for row in of_rows])
    return Verdict(rewards, torch.full(rewards.shape, -1), troubles(result.status for row in of_rows for result in row))


def troubles(statuses: Iterable[str]) -> dict[str, int]:
    """How many programs timed out, ran out of memory, were killed or refused, or printed too much."""
    return {status: count for status, count in Counter(statuses).items() if status not in ("passed", "failed")}


INPUTS = tuple(range(-3, 13))  # where the hidden tests look; the prompt shows two or three of SHOWN
SHOWN = range(1, 10)
TRAIN_PER_LEVEL, TEST_PER_LEVEL = 12_000, 500
LARGEST = 1 << 63  # of the values that are kept, and a bound on them: an expression makes larger ones in no time
LONGEST = 32  # characters of an expression; solutions have at most 9
# level -> expressions in x, a from 2 to 9 and b from 1 to 9
FORMS = {
    1: ["x+b", "x-b", "b-x", "a*x"],
    2: ["a*x+b", "a*x-b", "b-a*x", "x//a", "x%a"],
    3: ["x*x+b", "x*x-b", "b-x*x", "x*(x+b)", "x//a+b", "x//a-b", "x%a+b", "x%a*b"],
    4: ["a*x*x+b", "a*x*x-b", "x*x+a*x", "a*x-x*x", "a*x%b", "a*x//b", "x//a*b"],
    5: ["x*x%a+b", "x*x//a+b", "x*x//a-b", "x%a+x//b", "a*x+x%b", "a*x-x//b", "x*(x%a)+b"],
}
ARITHMETIC = re.compile(r"(?!.*\*\*)[0-9x+*/%() -]+")  # without powers: no expression takes long
PROGRAM = """
def values(inputs):
    rows = []
    for expression in {expressions!r}:
        try:
            code = compile(expression, "<expression>", "eval")
            rows.append([eval(code, {{"x": x}}) for x in inputs])
        except Exception:
            rows.append(None)
    return rows
"""
VALUES = f"""
value = values({list(INPUTS)})
assert type(value) is list and len(value) == {{}}
assert all(row is None or type(row) is list and len(row) == {len(INPUTS)} for row in value)
value = [row if row and all(type(y) is int and abs(y) < {LARGEST} for y in row) else None for row in value]
"""


def load_programs(name: str) -> Task:
    """The task `programs`: from points of a small integer function, such as "1>3 5>11:", to a Python expression in x,
    such as "2*x+1"; always the same problems in the same order. Usually more than one short expression fits the points;
    the hidden tests, on INPUTS, tell which one was meant. A function belongs to train or to test, not both. Votes:
    expressions with equal values on INPUTS are equal; one with other values than integers below 2**63 is none."""
    rng = random.Random(0)
    train, test, seen = [], [], set()
    for level, forms in FORMS.items():
        functions = {}  # values -> the first expression that has them
        for form in forms:
            for a, b in itertools.product(range(2, 10), range(1, 10)):
                expression = form.replace("a", str(a)).replace("b", str(b))
                functions.setdefault(tuple(eval(expression, {"x": x}) for x in INPUTS), expression)
        functions = {values: expression for values, expression in functions.items() if values not in seen}
        seen |= functions.keys()
        for problems, held_out, count in ((train, False, TRAIN_PER_LEVEL), (test, True, TEST_PER_LEVEL)):
            of_split = [pair for pair in functions.items() if (zlib.crc32(repr(pair[0]).encode()) % 5 == 0) == held_out]
            for values, expression in (rng.choice(of_split) for _ in range(count)):
                points = sorted(rng.sample(SHOWN, rng.choice((2, 3))))
                prompt = " ".join(f"{x}>{values[INPUTS.index(x)]}" for x in points)
                problems.append(Problem(f"{prompt}:", json.dumps(values), expression, level))
    warm_start = {"steps": 800, "batch": 128, "lr": 3e-3}
    return Task(name, train, test, verify_programs, max_new_tokens=12, warm_start=warm_start)


def verify_programs(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
    """1 for an expression with the function's values on all INPUTS; see `Task.verify` and `load_programs`."""
    values = values_of({response.strip() for row in responses for response in row})
    counts = troubles(values[response.strip()][0] for row in responses for response in row)
    verdict = arithmetic.verify(problems, responses, lambda text: (row := values[text.strip()][1]) and json.dumps(row))
    return dataclasses.replace(verdict, counts=counts)


def values_of(expressions: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Expression -> the sandbox's status and the values on INPUTS, None where they are not all integers below LARGEST.
    Values of programs that passed are kept for later calls: a policy repeats itself. Expressions of ARITHMETIC share
    programs, 32 to each, since they cannot touch each other; each of the others has a program of its own."""
    if len(_values) > 100_000:
        _values.clear()
    new = [expression for expression in expressions if _values.get(expression, ("failed",))[0] != "passed"]
    found = dict.fromkeys(new, ("failed", None))
    new = sorted(expression for expression in new if 0 < len(expression) <= LONGEST)
    plain = [expression for expression in new if ARITHMETIC.fullmatch(expression)]
    batches = [plain[i : i + 32] for i in range(0, len(plain), 32)]
    batches += [[expression] for expression in new if not ARITHMETIC.fullmatch(expression)]
    sources = [(PROGRAM.format(expressions=batch), VALUES.format(len(batch))) for batch in batches]
    programs = [Program(source, tests, ("values",), wall=0.5) for source, tests in sources]
    for batch, result in zip(batches, shared().run(programs)):
        for expression, row in zip(batch, result.value or [None] * len(batch), strict=True):
            found[expression] = result.status, row and tuple(row)
    _values.update(found)  # only now: the sandbox may have raised
    return _values


_values: dict[str, tuple[str, tuple[int, ...] | None]] = {}
