"""Files of one's own, --estimator FILE:NAME and --task FILE:load: docs/own.md, run, and every way to get one wrong."""

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import FLAGS, ROOT, outcome, records, steps_of

import common
import harness.run
from harness.load_file import load_estimator, load_file
from harness.parallel import reduce_metrics
from pass_at_k_pg import advantages
from verifiers import BadInput, Problem, Task, Verdict, with_checked_verdicts

PASS = "pass_at_k_pg.py"
PAGE = (ROOT / "docs" / "own.md").read_text()
TASK = re.search(r"^```python\n(.*?)^```", PAGE.partition("## Your own verifier")[2], re.M | re.S)[1]
VERIFY = "def verify(problems, responses):\n"
SMALL = "--steps 2 --k 2 --n 4 --prompts-per-step 4 --eval-n 4 --eval-problems 5 --max-new-tokens 3".split()
ESTIMATOR = """
import torch
from dataclasses import dataclass
from pass_at_k_pg import advantages
@dataclass
class Options:
    k: "int" = 1
def mine(rewards, k):
    return advantages(rewards, Options(k).k)
"""


@pytest.fixture
def mine(tmp_path):
    """mine(code) -> the path of a file of that code."""

    def written(code=TASK, name="mine.py"):
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return written


def refusal(function, *args) -> str:
    """The line in which a function refuses its arguments."""
    with pytest.raises(BadInput) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_function_its_module_and_the_hash_of_what_ran(mine):
    path = mine("from os.path import join\nX = 3\ndef f(): return X\n")
    function, module, digest = load_file(f"{path}:f")
    assert function() == 3 and module.X == 3
    assert pickle.loads(pickle.dumps(function)) is function  # as processes of one's own need
    # printf 'from os.path import join\nX = 3\ndef f(): return X\n' | sha256sum
    assert digest == "2903354d033cd5d99818982fc3ef7a7cafba69fefe921e09cf73e9d856f317cc"
    assert load_file(f"{mine('def f(): return 4')}:f")[2] != digest


def test_a_file_imports_what_is_beside_it_and_gradients_stay_on(mine, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    mine("X = 5\n", "beside_mine.py")
    code = "import torch, beside_mine\ntorch.set_grad_enabled(False)\ndef f(): return beside_mine.X\n"
    assert load_file(f"{mine(code)}:f")[0]() == 5 and torch.is_grad_enabled()


def test_a_file_may_have_a_name_that_modules_have(mine):
    """Neither takes the place of the other."""
    function, *_ = load_file(f"{mine(ESTIMATOR, 'common.py')}:mine")
    assert function(torch.eye(2), 2).tolist() == advantages(torch.eye(2), 2).tolist()
    assert sys.modules["common"] is common


FILE = "from math import sqrt\nX = 3\ndef f(rewards, k): return rewards\n"
FAILED = "running the file failed at {path}, line "
UNUSABLE = {  # name -> code, what is given, message
    "no colon": (FILE, "mine.py", "is not FILE:NAME"),
    "no name": (FILE, "{path}:", "is not FILE:NAME"),
    "no file": (FILE, "nowhere.py:f", "cannot read 'nowhere.py' of 'nowhere.py:f': [Errno 2]"),
    "a null character": (FILE, "a\0b:f", "cannot read"),
    "another name": (FILE, "{path}:g", "has no function 'g'; its functions: f"),
    "no function": (FILE, "{path}:X", "has no function 'X'"),
    "syntax": ("def f(\n", "{path}:f", FAILED + "1: SyntaxError: '(' was never closed"),
    "import": ("x = 1\nimport nothing_of_this_name\n", "{path}:f", FAILED + "2: ModuleNotFoundError: No module named"),
    "exit": ("import sys\nsys.exit('bye')\n", "{path}:f", FAILED + "2: SystemExit: bye"),
    "not text": ("\0", "{path}:f", "source code string cannot contain null bytes"),
    "lines": ("raise ValueError('one\\ntwo')", "{path}:f", FAILED + "1: ValueError: one two"),
}


@pytest.mark.parametrize("code, where, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used(code, where, message, mine):
    path = mine(code)
    assert message.format(path=path) in refusal(load_file, where.format(path=path))


RETURNS = {
    "rewards.sum(-1)": "must return a float tensor (2, 3) for rewards (2, 3), not float32 (2,)",
    "rewards.int()": "must return a float tensor (2, 3) for rewards (2, 3), not int32 (2, 3)",
    "rewards / 0": "is not finite with k = 2 for rewards [1.0, 0.0, 0.0]",
    "rewards.tolist()": "must return a float tensor (2, 3) for rewards (2, 3), not list",
    "rewards + torch.ones(5)": "f(rewards, 2) failed at",
    "missing": "line 3: NameError: name 'missing' is not defined",
}


@pytest.mark.parametrize("value, message", RETURNS.items(), ids=RETURNS)
def test_what_an_estimator_may_not_return(value, message, mine):
    path = mine(f"import torch\ndef f(rewards, k):\n    return {value}")
    estimate, metric, _ = load_estimator(f"{path}:f")
    assert metric is None and message in refusal(estimate, torch.tensor([[1.0, 0, 0], [1, 1, 1]]), 2)


def test_a_metric_is_checked_and_rewards_stay_as_they_are(mine):
    code = "def f(rewards, k):\n    rewards += 1\n    return rewards\ndef metric(rewards, k):\n    return rewards\n"
    estimate, metric, _ = load_estimator(f"{mine(code)}:f")
    rewards = torch.zeros(2, 3)
    assert estimate(rewards, 1).tolist() == torch.ones(2, 3).tolist() and rewards.sum() == 0
    assert "metric must return a float tensor (2,) for rewards (2, 3), not" in refusal(metric, rewards, 1)


ONE = torch.ones(2, 3)
VERDICTS = {
    "a list": ([[1.0] * 3] * 2, "must return a verifiers.Verdict, not list"),
    "rewards in a list": (Verdict([[1.0] * 3] * 2, ONE.long()), "rewards as a tensor of float32 (2, 3), not list"),
    "votes": (Verdict(ONE, ONE), "votes as a tensor of int64 (2, 3), not float32 (2, 3)"),
    "scores": (Verdict(ONE, ONE.long(), scores=ONE.T), "scores as a tensor of float32 (2, 3), not float32 (3, 2)"),
    "NaN": (Verdict(ONE.where(ONE.cumsum(-1) < 3, torch.nan), ONE.long()), "rewards that are not finite numbers, one "
            "of them to 'c': every response needs a number"),
    "counts in words": (Verdict(ONE, ONE.long(), {"lost": "two"}), "must return counts as whole numbers by name"),
    "counts of steps": (Verdict(ONE, ONE.long(), {"step": 2}), "a name must be text, and not step or eval"),
    "infinite scores": (Verdict(ONE, ONE.long(), scores=ONE / 0), "gave scores that are not finite numbers"),
}  # fmt: skip


def checked(value):
    """The verify of a task that returns this value, as the harness calls it."""
    return with_checked_verdicts(Task("mine", [], [], lambda problems, responses: value)).verify


@pytest.mark.parametrize("value, message", VERDICTS.values(), ids=VERDICTS)
def test_what_a_verifier_may_not_return(value, message):
    line = refusal(checked(value), [Problem("1", "1")] * 2, [["a", "b", "c"], ["d", "e", "f"]])
    assert line.startswith("the verifier of mine") and message in line


def test_what_is_right_passes_as_it_is_and_without_the_graph_of_a_model():
    verdict = Verdict(ONE, ONE.long(), {"timeouts": 2})
    assert checked(verdict)([Problem("1", "1")] * 2, [["a"] * 3] * 2) is verdict and verdict.scores is verdict.rewards
    counts = checked(Verdict(ONE, ONE.long(), {"a": torch.tensor(2), "b": np.int64(3)}))([], [["a"] * 3] * 2).counts
    assert json.dumps(counts) == '{"a": 2, "b": 3}'
    assert reduce_metrics({"loss": 0.5}, {"loss": 2, "b": 3}) == {"loss": 0.5, "b": 3}
    rewards = torch.ones(1, 2, requires_grad=True)
    verdict = checked(Verdict(rewards * 2, rewards.long()))([Problem("1", "1")], [["a", "b"]])
    assert not (verdict.rewards.requires_grad or verdict.scores.requires_grad) and verdict.rewards.tolist() == [[2, 2]]


@pytest.mark.parametrize("name", ["all_right.py", "baselines.py"])
def test_the_code_on_the_page_is_that_of_the_recipes(name):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.partition("## Your own verifier")[0], re.M | re.S)
    code = (ROOT / "recipes" / name).read_text()
    assert len(blocks) == 2 and [code.endswith(block) for block in blocks].count(True) == 1


def test_the_page_has_a_whole_verifier_of_few_lines(mine):
    assert len([line for line in TASK.splitlines() if line.strip()]) <= 15
    task = load_file(f"{mine()}:load")[0]("mine", None)
    verdict = task.verify([Problem("7+5=", "12")], [["12", " 12 apples", "13", "none", ""]])
    assert verdict.rewards.tolist() == [[1, 1, 0, 0, 0]] and verdict.rewards.dtype == torch.float32
    assert verdict.votes.tolist() == [[0, 0, 2, -1, -1]]
    assert {problem.prompt for problem in task.train}.isdisjoint(problem.prompt for problem in task.test)
    assert all(task.verify([problem], [[problem.answer]]).rewards.tolist() == [[1]] for problem in task.train)


def test_an_estimator_trains_as_the_same_one_by_name(run, skilled, mine):
    where = f"{mine(ESTIMATOR)}:mine"
    for flags in (["--run-name", "name"], ["--run-name", "file", "--estimator", where]):
        run(PASS, *FLAGS, "--model", skilled, *flags, code=0)
    assert outcome(Path("runs/name")) == outcome(Path("runs/file"))
    assert any(step["grad_norm"] > 0 for step in steps_of(Path("runs/file")))
    args = json.loads(Path("runs/file/args.json").read_text())
    assert args["estimator"] == where and args["files"][where] == load_file(where)[2]


def test_pass_hat_k_and_its_metric_stand_in_the_tables(run, skilled):
    out = run(PASS, *FLAGS, "--model", skilled, "--estimator", f"{ROOT}/recipes/all_right.py:all_right", code=0).stdout
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("pass_at_k_pg-arithmetic-") and "all_right-k2" in folder.name
    assert all(name in out for name in ("pass@1", "pass@2", "metric@1", "metric@2", "metric@4"))
    assert "metric@4" in records(folder)[0]["eval"]["all"]
    steps = steps_of(folder)
    assert all(step["metric@2"] <= step["reward"] <= step["pass@2"] for step in steps)
    assert any(step["metric@2"] < step["reward"] for step in steps)


def test_an_error_in_step_3_is_one_line_and_keeps_the_steps_before(run, skilled, mine):
    code = "calls = []\ndef check():\n    assert len(calls) < 4, 'too many'\n"
    code += "def third(rewards, k):\n    calls.append(k)\n    check()\n    return mine(rewards, k)\n"
    path = mine(ESTIMATOR + code)
    flags = [*FLAGS, "--model", skilled, "--run-name", "one", "--save-every", "50", "--estimator", f"{path}:third"]
    stderr = run(PASS, *flags, code=2).stderr
    failed = f"error: third(rewards, 2) failed at {path}, line 12: AssertionError: too many"
    saved = "(step 2 is saved: mend it, then --resume runs/one --changed-files)"
    assert stderr.splitlines()[-1] == f"{failed} {saved}" and "Traceback" not in stderr
    progress = torch.load("runs/one/checkpoint.pt", weights_only=True)["progress"]
    assert progress["step"] == 2  # the first call was before the run began
    mine(ESTIMATOR + code.replace("< 4", "< 40"))
    run(PASS, "--resume", "runs/one", "--changed-files", code=0)


def test_a_metric_that_breaks_in_the_last_evaluation_loses_no_step(run, skilled, mine):
    path = mine(ESTIMATOR + "calls = []\ndef metric(rewards, k):\n    calls.append(k)\n"
                "    return rewards.mean(-1) / (len(calls) < 8 or len(rewards) > 2)\n")  # fmt: skip
    flags = [*FLAGS, "--eval-every", "0", "--save-every", "50", "--model", skilled, "--run-name", "one"]
    line = run(PASS, *flags, "--estimator", f"{path}:mine", code=2).stderr.splitlines()[-1]
    saved = torch.load("runs/one/checkpoint.pt", weights_only=True)["progress"]["step"]
    assert f"(step {saved} is saved: mend it" in line and saved == len(steps_of(Path("runs/one"))) > 0
    samples = Path("runs/one/samples.jsonl").read_text()
    assert {json.loads(row)["step"] for row in samples.splitlines()} == {0}  # of an evaluation that is not done


def test_problems_that_have_changed_are_not_resumed(run, refused, skilled, mine, monkeypatch):
    """Training problems are the user's to change, with --changed-files; held-out ones are those of the table."""
    code = "import os\n" + TASK.replace("sums[::2]", "sums[int(os.environ['A'])::2]").replace(
        "sums[1::2]", "sums[int(os.environ['B'])::2]")  # fmt: skip
    monkeypatch.setenv("A", "0"), monkeypatch.setenv("B", "1")
    run(PASS, *SMALL, "--task", f"{mine(code)}:load", "--model", skilled, "--run-name", "a", code=0)
    monkeypatch.setenv("A", "2")
    assert "the training set has changed since runs/a began" in refused(PASS, "--resume", "runs/a")
    run(PASS, "--resume", "runs/a", "--changed-files", code=0)
    monkeypatch.setenv("B", "3")
    assert "the held-out problems have changed" in refused(PASS, "--resume", "runs/a", "--changed-files")


def test_a_run_on_a_task_is_resumed_with_the_same_file_alone(run, refused, skilled, mine):
    where, script = f"{mine()}:load", "majority_pg.py"
    run(script, *SMALL, "--task", where, "--model", skilled, code=0)
    (folder,) = Path("runs").iterdir()
    assert "mine.py_load" in folder.name and ":" not in folder.name
    assert len(steps_of(folder)) == 2 and "pass@4" in records(folder)[0]["eval"]["all"]
    args, before = json.loads((folder / "args.json").read_text()), outcome(folder)
    assert args["task"] == where and args["files"][where] == load_file(where)[2]
    run(script, "--resume", str(folder), code=0)
    mine(TASK + "# changed\n")
    assert f"{where} has changed since {folder} began" in refused(script, "--resume", str(folder))
    assert outcome(folder) == before
    out = run(script, "--resume", str(folder), "--changed-files", "--steps", "3", code=0).stdout
    assert len(steps_of(folder)) == 3 and "the result is neither file's alone" in out
    assert json.loads((folder / "args.json").read_text())["files"][where] == load_file(where)[2] != args["files"][where]


def test_a_learned_verifier_is_cached_for_one_version_of_the_file(refused, skilled, mine, monkeypatch):
    """Its labels are those of the file's verify."""

    def named(name, write):
        raise BadInput(name)

    monkeypatch.setattr(harness.run, "tiny_seed", lambda name: 0)
    monkeypatch.setattr(harness.run, "cached_folder", named)
    for code in (TASK, TASK + "# changed\n"):
        where = f"{mine(code)}:load"
        line = refused("bon_rl.py", *SMALL, "--task", where, "--model", skilled, "--verifier", "learned")
        assert line.endswith(f"-t3-lall-{load_file(where)[2][:12]}")


def test_best_of_n_by_scores_of_ones_own_is_not_called_pass_at_n(run, refused, skilled, mine):
    """Of four responses the first is right, and the verifier prefers the others: pass@4 is 1, bon@4 is 0."""
    tensors = "torch.eye(1, n).repeat(B, 1), torch.zeros(B, n).long(), scores=torch.arange(n * 1.0).repeat(B, 1)"
    code = f"{VERIFY}    B, n = len(problems), len(responses[0])\n    return Verdict({tensors})\n"
    where = f"{mine(TASK.replace(VERIFY, code))}:load"
    for script, flags in ("bon_rl.py", [*SMALL, "--steps", "0"]), ("bon_sft.py", [*SMALL, "--steps", "0", "--n", "8"]):
        run(script, *flags, "--task", where, "--model", skilled, "--run-name", script[:-3], code=0)
        values = records(Path("runs") / script[:-3])[0]["eval"]["all"]
        expected = {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1, "bon@1": 0.25, "bon@2": 0, "bon@4": 0}
        assert {name: values[name][0] for name in expected} == expected
    line = refused("bon_rl.py", *SMALL, "--task", where, "--model", "nowhere", "--estimator", "rlb")
    assert "a closed form for scores that are the rewards: use exact" in line


BROKEN = {
    "verify raises": (TASK.replace(VERIFY, f"{VERIFY}    1 / 0\n"), "line 12: ZeroDivisionError: division by zero"),
    "no task": ("def load(name, data): return 1", "load(name, data) must return a verifiers.Task, not int"),
    "raises": ("def load(name, data):\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    **{change: (TASK.replace(*change.split(" -> ")), message) for change, message in {
        "sums[::2] -> (x for x in sums)": "train must be a list of problems, not generator",
        "sums[1::2] -> {*sums}": "test must be a list of problems, not set",
        "sums[1::2] -> [{'prompt': '1'}]": "test must have Problems: there is a dict in",
        "str(a + b)) -> str(a + b), solution=3)": "train must have Problems: solution is no text",
        'f"{a}+{b}=" -> "\\ud800"': "train must have Problems: prompt is no text",
        "str(a + b)) -> str(a + b), level='hard')": "train must have Problems: level is no int",
        "verify) -> verify, max_new_tokens=4.0)": "max_new_tokens must be a whole number from 1 on, not 4.0",
        "verify) -> verify, template=None)": "template must be text with {prompt}, not None",
        "verify) -> verify, warm_start={'steps': 1})": "warm_start must be None, or a dict with steps, batch and lr",
        "verify) -> verify, words=3)": "words must be None or a function, not 3",
    }.items()},
    "own words": ("from verifiers import BadInput\ndef load(name, data):\n    raise BadInput('no grid.txt here')",
                  "error: no grid.txt here"),
}  # fmt: skip


@pytest.mark.parametrize("code, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_task_is_one_line(code, message, refused, mine):
    assert message in refused(PASS, *SMALL, "--task", f"{mine(code)}:load", "--model", "nowhere")
    assert not Path("runs").exists()  # told before the model is looked for


OWN = {
    "words=lambda prompt: 3": "words must return text, not 3",
    "words=lambda prompt: 1 / 0": "ZeroDivisionError: division by zero",
    "best=lambda problems, k: 0.5": "best must return a tensor (P,), not 0.5",
}


@pytest.mark.parametrize("field, message", OWN.items(), ids=OWN)
def test_what_words_and_best_may_not_return(field, message, mine):
    task = harness.run.load_own_task(f"{mine(TASK.replace('verify)', f'verify, {field})'))}:load", None)[0]
    function, args = (task.words, ["1+1="]) if task.words else (task.best, [task.test, 1])
    assert message in refusal(function, *args)
