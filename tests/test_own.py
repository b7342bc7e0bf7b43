"""docs/own.md: its files are those of recipes/; for its commands see test_readme.py. benchmarks/baselines.py, small."""

import re
import subprocess
import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that is started there
DOC = (ROOT / "docs" / "own.md").read_text().partition("## Your own verifier")[0]  # that part: test_own_task.py


@pytest.mark.parametrize("name", ["all_right.py", "baselines.py"])
def test_the_code_is_that_of_the_files(name):
    blocks = re.findall(r"^```python\n(.*?)^```", DOC, re.M | re.S)
    code = (ROOT / "recipes" / name).read_text()
    assert len(blocks) == 2 and sum(block in code for block in blocks) == 1
    assert code.endswith(next(block for block in blocks if block in code))


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
