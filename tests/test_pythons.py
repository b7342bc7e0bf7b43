"""The fast tests on other Pythons, where they are installed. README promises 3.11 and newer: transformers 5.24 needs
it, and on 3.10 this is skipped in pip's words."""

import shutil
import subprocess
from pathlib import Path

import pytest
from runs import ROOT


@pytest.fixture(scope="module", params=["3.10", "3.12", "3.13"])
def python(request, tmp_path_factory):
    """The interpreter of a new virtual environment of this version with what requirements.txt names."""
    found = [shutil.which(f"python{request.param}"), *Path.home().glob(f".pyenv/versions/{request.param}.*/bin/python")]
    works = [x for x in found if x and subprocess.run([x, "-c", ""], capture_output=True).returncode == 0]
    if not works:
        pytest.skip(f"no Python {request.param} is installed")
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([works[0], "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"requirements.txt cannot be installed on it: {result.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


@pytest.mark.slow
def test_the_fast_tests_pass_on_another_python(python):
    command = [python, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
