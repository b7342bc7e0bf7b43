"""Estimators of one's own, --estimator FILE:NAME: what a file may do, and every way to get it wrong."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from runs import FLAGS, ROOT, outcome, records, steps_of

import common
from harness.load_file import load_estimator, load_file
from pass_at_k_pg import advantages
from verifiers import BadInput

GOOD = """
import torch
from dataclasses import dataclass
from pass_at_k_pg import advantages
@dataclass
class Options:
    k: "int" = 1
def mine(rewards, k):
    return advantages(rewards, Options(k).k)
"""
ALL_RIGHT = str(ROOT / "recipes" / "all_right.py")


@pytest.fixture
def mine(tmp_path):
    """mine(code) -> the path of a file of that code."""

    def written(code, name="mine.py"):
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return written


def test_the_function_its_module_and_the_hash_of_what_ran(mine):
    path = mine("from os.path import join\nX = 3\ndef f(): return X\n")
    function, module, digest = load_file(f"{path}:f")
    assert function() == 3 and module.X == 3
    # printf 'from os.path import join\nX = 3\ndef f(): return X\n' | sha256sum
    assert digest == "2903354d033cd5d99818982fc3ef7a7cafba69fefe921e09cf73e9d856f317cc"
    assert load_file(f"{mine('def f(): return 4')}:f")[2] != digest


def test_a_file_may_have_a_name_that_modules_have(mine):
    """Neither takes the place of the other."""
    function, *_ = load_file(f"{mine(GOOD, 'common.py')}:mine")
    assert function(torch.eye(2), 2).tolist() == advantages(torch.eye(2), 2).tolist()
    assert sys.modules["common"] is common


WRONG = {
    "no colon": ("mine.py", "is not FILE:NAME"),
    "no name": ("{path}:", "is not FILE:NAME"),
    "no file": ("nowhere.py:f", "cannot read 'nowhere.py' of 'nowhere.py:f': [Errno 2]"),
    "a folder": ("{folder}:f", "[Errno 21] Is a directory"),
    "a null character": ("a\0b:f", "cannot read"),
    "another name": ("{path}:g", "has no function 'g'; its functions: f"),
    "no function": ("{path}:X", "has no function 'X'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there(name, mine, tmp_path):
    where, message = WRONG[name]
    path = mine("from math import sqrt\nX = 3\ndef f(rewards, k): return rewards\n")
    with pytest.raises(BadInput) as error:
        load_file(where.format(path=path, folder=tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


BROKEN = {
    "syntax": ("def f(\n", "line 1: SyntaxError: '(' was never closed"),
    "import": ("x = 1\nimport nothing_of_this_name\n", "line 2: ModuleNotFoundError: No module named"),
    "exit": ("import sys\nsys.exit('bye')\n", "line 2: SystemExit: bye"),
    "not text": ("\0", "source code string cannot contain null bytes"),
    "lines": ("raise ValueError('one\\ntwo')", "line 1: ValueError: one two"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_run(name, mine):
    code, message = BROKEN[name]
    with pytest.raises(BadInput) as error:
        load_file(f"{mine(code)}:f")
    assert message in str(error.value) and "running the file failed at" in str(error.value)
    assert "\n" not in str(error.value)


RETURNS = {
    "rewards.sum(-1)": "must return shape (2, 3), not (2,), for rewards (2, 3)",
    "rewards.int()": "must return floating point, not torch.int32",
    "rewards / 0": "is not finite with k = 2 for rewards [1.0, 0.0, 0.0]",
    "rewards.tolist()": "must return a tensor (2, 3), not list",
    "rewards + torch.ones(5)": "f(rewards, 2) failed at",
    "missing": "line 3: NameError: name 'missing' is not defined",
}


@pytest.mark.parametrize("value", RETURNS)
def test_what_an_estimator_may_not_return(value, mine):
    path = mine(f"import torch\ndef f(rewards, k):\n    return {value}")
    estimate, metric, _ = load_estimator(f"{path}:f")
    assert metric is None
    with pytest.raises(BadInput) as error:
        estimate(torch.tensor([[1.0, 0, 0], [1, 1, 1]]), 2)
    assert RETURNS[value] in str(error.value) and "\n" not in str(error.value)


def test_a_metric_is_checked_and_rewards_stay_as_they_are(mine):
    code = "def f(rewards, k):\n    rewards += 1\n    return rewards\ndef metric(rewards, k):\n    return rewards\n"
    estimate, metric, _ = load_estimator(f"{mine(code)}:f")
    rewards = torch.zeros(2, 3)
    assert estimate(rewards, 1).tolist() == torch.ones(2, 3).tolist() and rewards.sum() == 0
    with pytest.raises(BadInput, match=r"metric must return shape \(2,\), not \(2, 3\)"):
        metric(rewards, 1)


@pytest.mark.parametrize("name", ["all_right.py", "baselines.py"])
def test_the_code_on_the_page_is_that_of_the_recipes(name):
    page = (ROOT / "docs" / "own.md").read_text().partition("## Your own verifier")[0]  # that part: test_own_task.py
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = (ROOT / "recipes" / name).read_text()
    assert len(blocks) == 2 and [code.endswith(block) for block in blocks].count(True) == 1


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_file_trains_as_the_same_estimator_by_name(run, skilled, mine):
    path = mine(GOOD)
    assert run("pass_at_k_pg.py", *FLAGS, "--model", skilled, "--run-name", "name").returncode == 0
    result = run("pass_at_k_pg.py", *FLAGS, "--model", skilled, "--run-name", "file", "--estimator", f"{path}:mine")
    assert result.returncode == 0, result.stderr
    assert outcome(Path("runs/name")) == outcome(Path("runs/file"))
    assert any(step["grad_norm"] > 0 for step in steps_of(Path("runs/file")))
    args = json.loads(Path("runs/file/args.json").read_text())
    assert args["estimator"] == f"{path}:mine" and args["files"] == {f"{path}:mine": load_file(f"{path}:mine")[2]}


def test_pass_hat_k_and_its_metric_stand_in_the_tables(run, skilled):
    result = run("pass_at_k_pg.py", *FLAGS, "--model", skilled, "--estimator", f"{ALL_RIGHT}:all_right")
    assert result.returncode == 0, result.stderr
    folder = next(Path("runs").iterdir())
    assert folder.name.startswith("pass_at_k_pg-arithmetic-") and "all_right-k2" in folder.name
    for name in ("pass@1", "pass@2", "metric@1", "metric@2", "metric@4"):
        assert name in result.stdout
    assert "metric@4" in records(folder)[0]["eval"]["all"]
    steps = steps_of(folder)
    assert all(step["metric@2"] <= step["reward"] <= step["pass@2"] for step in steps)
    assert any(step["metric@2"] < step["reward"] for step in steps)


def test_an_error_in_step_3_is_one_line_and_keeps_the_steps_before(run, skilled, mine):
    code = GOOD + "calls = []\ndef third(rewards, k):\n    calls.append(k)\n    assert len(calls) < 4, 'too many'\n"
    path = mine(code + "    return mine(rewards, k)\n")
    result = run("pass_at_k_pg.py", *FLAGS, "--model", skilled, "--run-name", "one", "--save-every", "50",
                 "--estimator", f"{path}:third")  # fmt: skip
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    failed = f"error: third(rewards, 2) failed at {path}, line 13: AssertionError: too many"
    assert last == f"{failed} (step 2 is saved: mend it, then --resume runs/one --changed-files)"
    assert "Traceback" not in result.stderr
    saved = torch.load("runs/one/checkpoint.pt", weights_only=True)["progress"]
    assert saved["step"] == 2  # the first call was before the run began


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--estimator", "mode"], "--estimator must be mean, unbiased, biased, maxrl or FILE:NAME, not 'mode'"),
        (["--estimator", "nowhere.py:f"], "cannot read 'nowhere.py'"),
        (["--estimator", "{path}:sums"], "sums must return shape (5, 4), not (5,)"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(flags, message, run, skilled, mine):
    path = mine("def sums(rewards, k):\n    return rewards.sum(-1)\n")
    flags = [flag.format(path=path) for flag in flags]
    result = run("pass_at_k_pg.py", *FLAGS, "--model", skilled, *flags)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not Path("runs").exists()
