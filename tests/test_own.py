"""docs/own.md: its files are those of recipes/, and its commands run; benchmarks/baselines.py, small."""

import re
import shlex
import subprocess
import sys

import pytest
from runs import ROOT, steps_of

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that is started there
DOC = (ROOT / "docs" / "own.md").read_text().partition("## Your own verifier")[0]  # that part: test_own_task.py
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", DOC, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("name", ["all_right.py", "baselines.py"])
def test_the_code_is_that_of_the_files(name):
    blocks = re.findall(r"^```python\n(.*?)^```", DOC, re.M | re.S)
    code = (ROOT / "recipes" / name).read_text()
    assert len(blocks) == 2 and sum(block in code for block in blocks) == 1
    assert code.endswith(next(block for block in blocks if block in code))


@pytest.mark.parametrize("command", [x for x in COMMANDS if "baselines.py   " not in x])
def test_a_command(command, run, skilled, tmp_path):
    program, script, *flags = shlex.split(command.partition("#")[0])
    assert program == "python"
    flags = [str(ROOT / x) if x.startswith("recipes/") else x for x in flags]
    if script == "pass_at_k_pg.py":
        flags += "--task arithmetic --levels 1 --steps 2 --prompts-per-step 4 --eval-n 8 --eval-problems 2".split()
        flags += ["--model", skilled]
    result = run(script, *flags)
    assert result.returncode == 0, result.stderr
    if script == "pass_at_k_pg.py":
        folder = next((tmp_path / "runs").iterdir())
        assert len(steps_of(folder)) == 2 and any(step["grad_norm"] > 0 for step in steps_of(folder))


def test_the_commands_are_found():
    assert len(COMMANDS) == 7 and "python benchmarks/baselines.py" in COMMANDS[-1]


@pytest.mark.slow
def test_four_estimators_two_seeds(tmp_path, skilled):
    flags = "--k 2 --n 4 --seeds 2 --steps 2".split()
    more = f"--eval-n 4 --eval-problems 2 --model {skilled}"
    command = [sys.executable, str(ROOT / "benchmarks" / "baselines.py"), *flags, f"--more={more}"]
    for _ in range(2):  # the second time nothing is run
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()
    assert [row.split("  ")[0] for row in rows[1:5]] == ["u(k)", "b(k+1)", "(1-s) u(k) + s b(k+1)", "posterior mean"]
    assert "writing to" not in result.stdout
    command[command.index("--n") + 1] = "2"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "--n must be more than --k 2" in result.stderr
