"""A task of one's own, --task FILE:load: the page of docs/own.md, run, and every way to get it wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from runs import ROOT, outcome, records, steps_of

import harness.run
from harness.load_file import load_file
from verifiers import BadInput, Problem, Task, Verdict, with_checked_verdicts

OWN = (ROOT / "docs" / "own.md").read_text().partition("## Your own verifier")[2]
CODE = re.search(r"^```python\n(.*?)^```", OWN, re.M | re.S)[1]
SMALL = "--steps 2 --k 2 --n 4 --prompts-per-step 4 --eval-n 4 --eval-problems 5 --max-new-tokens 3".split()


@pytest.fixture
def mine(tmp_path):
    """mine(code) -> "FILE:load" of a file of that code."""

    def written(code=CODE):
        (tmp_path / "my_verifier.py").write_text(code)
        return f"{tmp_path / 'my_verifier.py'}:load"

    return written


def test_the_page_has_a_whole_verifier_of_few_lines(mine):
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 15
    load, *_ = load_file(mine())
    task = load("mine", None)
    responses = [["12", " 12 apples", "13", "none", ""]]
    verdict = task.verify([Problem("7+5=", "12")], responses)
    assert verdict.rewards.tolist() == [[1, 1, 0, 0, 0]] and verdict.rewards.dtype == torch.float32
    assert verdict.votes.tolist() == [[0, 0, 2, -1, -1]]
    assert {problem.prompt for problem in task.train}.isdisjoint(problem.prompt for problem in task.test)
    for problem in task.train:
        assert task.verify([problem], [[problem.answer]]).rewards.tolist() == [[1]]


def test_a_run_on_it_that_is_resumed_with_the_same_file_alone(run, skilled, mine):
    where, script = mine(), "majority_pg.py"
    result = run(script, *SMALL, "--task", where, "--model", skilled, "--run-name", "one")
    assert result.returncode == 0, result.stderr
    folder = Path("runs/one")
    assert len(steps_of(folder)) == 2 and "pass@4" in records(folder)[0]["eval"]["all"]
    args, before = json.loads((folder / "args.json").read_text()), outcome(folder)
    assert args["task"] == where and args["files"] == {where: load_file(where)[2]}
    assert run(script, "--resume", "runs/one").returncode == 0
    mine(CODE + "# changed\n")
    result = run(script, "--resume", "runs/one")
    assert result.returncode == 2 and f"{where} has changed since runs/one began" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and outcome(folder) == before
    result = run(script, "--resume", "runs/one", "--changed-files", "--steps", "3")
    assert result.returncode == 0 and len(steps_of(folder)) == 3, result.stderr
    assert "the result is neither file's alone" in result.stdout
    assert json.loads((folder / "args.json").read_text())["files"] == {where: load_file(where)[2]} != args["files"]


def test_an_own_verifier_that_raises_is_one_line_and_its_step_is_saved(run, skilled, mine):
    where = mine(CODE.replace(VERIFY, f"{VERIFY}    len(problems) > 1 and 1 / 0\n"))
    result = run("pass_at_k_pg.py", *SMALL, "--task", where, "--model", skilled, "--run-name", "one")
    path = where.rpartition(":")[0]
    assert result.returncode == 2 and f"failed at {path}, line " in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("(step 0 is saved: mend it, then --resume runs/one --changed-files)")
    mine()
    assert run("pass_at_k_pg.py", "--resume", "runs/one", "--changed-files").returncode == 0


def test_a_run_is_named_for_the_file(run, skilled, mine):
    result = run("pass_at_k_pg.py", *SMALL, "--steps", "0", "--task", mine(), "--model", skilled)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    assert "my_verifier.py_load" in folder.name and ":" not in folder.name


ONE = torch.ones(2, 3)
WRONG = {
    "a list": ([[1.0] * 3] * 2, "must return a verifiers.Verdict, not list"),
    "None": (None, "must return a verifiers.Verdict, not NoneType"),
    "rewards in a list": (Verdict([[1.0] * 3] * 2, ONE.long()), "rewards as a tensor of float32 (2, 3), not list"),
    "(B, 2)": (Verdict(ONE[:, :2], ONE.long()), "rewards as a tensor of float32 (2, 3), not float32 (2, 2)"),
    "(B,)": (Verdict(ONE[:, 0], ONE.long()), "rewards as a tensor of float32 (2, 3), not float32 (2,)"),
    "booleans": (Verdict(ONE.bool(), ONE.long()), "rewards as a tensor of float32 (2, 3), not bool (2, 3)"),
    "float64": (Verdict(ONE.double(), ONE.long()), "rewards as a tensor of float32 (2, 3), not float64 (2, 3)"),
    "votes": (Verdict(ONE, ONE), "votes as a tensor of int64 (2, 3), not float32 (2, 3)"),
    "scores": (Verdict(ONE, ONE.long(), scores=ONE.T), "scores as a tensor of float32 (2, 3), not float32 (3, 2)"),
    "NaN": (Verdict(ONE.where(ONE.cumsum(-1) < 3, torch.nan), ONE.long()), "rewards that are not finite numbers, one "
            "of them to 'c': every response needs a number"),
    "infinite scores": (Verdict(ONE, ONE.long(), scores=ONE / 0), "gave scores that are not finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_verifier_may_not_return(name):
    value, message = WRONG[name]
    task = with_checked_verdicts(Task("mine", [], [], lambda problems, responses: value))
    with pytest.raises(BadInput) as error:
        task.verify([Problem("1", "1")] * 2, [["a", "b", "c"], ["d", "e", "f"]])
    assert str(error.value).startswith("the verifier of mine") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_right_passes_as_it_is():
    verdict = Verdict(ONE, ONE.long(), {"timeouts": 2})
    task = with_checked_verdicts(Task("mine", [], [], lambda *batch: verdict))
    assert task.verify([Problem("1", "1")] * 2, [["a"] * 3] * 2) is verdict and verdict.scores is verdict.rewards


def test_what_is_computed_by_a_model_is_taken_out_of_its_graph():
    rewards = torch.ones(1, 2, requires_grad=True)
    verdict = Verdict(rewards * 2, rewards.long())
    task = with_checked_verdicts(Task("mine", [], [], lambda *batch: verdict))
    checked = task.verify([Problem("1", "1")], [["a", "b"]])
    assert not (checked.rewards.requires_grad or checked.scores.requires_grad) and checked.rewards.tolist() == [[2, 2]]


def test_a_learned_verifier_is_cached_for_one_version_of_the_file(run, skilled, mine, monkeypatch):
    """Its labels are those of the file's verify."""

    def named(name, write):
        raise BadInput(name)

    monkeypatch.setattr(harness.run, "tiny_seed", lambda name: 0)
    monkeypatch.setattr(harness.run, "cached_folder", named)
    names = []
    for code in (CODE, CODE + "# changed\n"):
        where = mine(code)
        flags = [flag.replace("--k", "--N") for flag in SMALL]
        names.append(run("bon_rl.py", *flags, "--task", where, "--model", skilled, "--verifier", "learned").stderr)
        assert names[-1].strip().endswith(f"-t3-lall-{load_file(where)[2][:12]}")
    assert names[0] != names[1]


VERIFY = "def verify(problems, responses):\n"
BROKEN = {
    "verify raises": (CODE.replace(VERIFY, f"{VERIFY}    1 / 0\n"), "line 12: ZeroDivisionError: division by zero"),
    "no task": ("def load(name, data): return 1", "load(name, data) must return a verifiers.Task, not int"),
    "raises": ("def load(name, data):\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    "own words": ("from verifiers import BadInput\ndef load(name, data):\n    raise BadInput('no grid.txt here')",
                  "error: no grid.txt here"),
    "a list": (re.sub(r"return Verdict\((.*)\)$", r"return [\1]", CODE, flags=re.M),
               "must return a verifiers.Verdict, not list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, run, skilled, mine):
    code, message = BROKEN[name]
    result = run("pass_at_k_pg.py", *SMALL, "--task", mine(code), "--model", "nowhere")
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr and not Path("runs").exists()  # told before the model is looked for


def test_best_of_n_by_scores_of_ones_own_is_not_called_pass_at_n(run, skilled, mine):
    """Of four responses the first is right, and the verifier prefers the others: pass@4 is 1, bon@4 is 0."""
    tensors = "torch.eye(1, n).repeat(B, 1), torch.zeros(B, n).long(), scores=torch.arange(n * 1.0).repeat(B, 1)"
    code = f"{VERIFY}    B, n = len(problems), len(responses[0])\n    return Verdict({tensors})\n"
    where = mine(CODE.replace(VERIFY, code))
    for script, flags in ("bon_rl.py", [*SMALL, "--steps", "0"]), ("bon_sft.py", [*SMALL, "--steps", "0", "--n", "8"]):
        result = run(script, *flags, "--task", where, "--model", skilled, "--run-name", script[:-3])
        assert result.returncode == 0, result.stderr
        values = records(Path("runs") / script[:-3])[0]["eval"]["all"]
        assert {name: values[name][0] for name in ("pass@1", "pass@2", "pass@4", "bon@1", "bon@2", "bon@4")} == {
            "pass@1": 0.25, "pass@2": 0.5, "pass@4": 1, "bon@1": 0.25, "bon@2": 0, "bon@4": 0
        }  # fmt: skip
    result = run("bon_rl.py", *SMALL, "--task", where, "--model", "nowhere", "--estimator", "rlb")
    assert result.returncode == 2 and "a closed form for scores that are the rewards: use exact" in result.stderr
