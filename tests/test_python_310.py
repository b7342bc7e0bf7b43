"""The fast tests on the oldest Python that README promises, where one is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from runs import ROOT


def python_310() -> str | None:
    """One that runs: on the path, or of pyenv."""
    found = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10.*/bin/python")]
    works = (str(x) for x in found if x and subprocess.run([x, "-c", ""], capture_output=True).returncode == 0)
    return next(works, None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of a new virtual environment of Python 3.10 with what requirements.txt names."""
    if not (python := python_310()):
        pytest.skip("no Python 3.10 is installed")
    folder = tmp_path_factory.mktemp("python310")
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"the requirements cannot be installed there: {result.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


@pytest.mark.slow
def test_the_fast_tests_pass_on_python_310(installed):
    command = [installed, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
