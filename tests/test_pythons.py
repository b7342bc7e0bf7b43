"""The fast tests on other Pythons, where they are installed. README promises 3.11 and newer, as
transformers 5.24 does."""

import shutil
import subprocess
from pathlib import Path

import pytest
from runs import ROOT


@pytest.fixture(scope="module", params=["3.12", "3.13"])
def python(request, tmp_path_factory):
    """The interpreter of a new virtual environment of this version with what requirements.txt names."""
    found = [shutil.which(f"python{request.param}"), *Path.home().glob(f".pyenv/versions/{request.param}.*/bin/python")]
    works = [x for x in found if x and subprocess.run([x, "-c", ""], capture_output=True).returncode == 0]
    if not works:
        pytest.skip(f"no Python {request.param} is installed")
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([works[0], "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")]
    subprocess.run(pip, check=True)
    return folder / "bin/python"


@pytest.mark.slow
def test_the_fast_tests_pass_on_another_python(python):
    command = [python, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
