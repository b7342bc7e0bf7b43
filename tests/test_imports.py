"""What `--help` says and takes, and where an estimator can be imported."""

import re
import subprocess
import sys

import pytest
from runs import ROOT, SCRIPTS

HEAVY = ["transformers.modeling_utils", "transformers.models.llama.modeling_llama", "datasets", "matplotlib"]
HEAVY += ["math_verify", "sympy"]
EXTRAS = ["tyro", "matplotlib", "math_verify", "landlockpy", "pyseccomp", "hypothesis", "resource", "fcntl"]
COMMANDS = [[script, "--help"] for script in (*SCRIPTS, "bandit.py")] + [["bon_rl.py", "--preset", "paper", "--help"]]
CODE = f"""
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Missing())
import majority_pg, bon_rl, bon_sft, bandit
from pass_at_k_pg import advantages, torch
print(advantages(torch.tensor([[1.0, 0, 0]]), 2).tolist())
print("LOADED", *(x for x in {EXTRAS + HEAVY} if x in sys.modules))
sys.meta_path.pop(0)
for command in {COMMANDS}:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code
    print("LOADED", *(x for x in {HEAVY} if x in sys.modules))
"""


@pytest.fixture(scope="module")
def printed():
    """What the code prints in a process of its own, a pair for each LOADED: the text before it, and what it lists."""
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.findall(r"(.*?)LOADED ?(.*?)\n", run.stdout, re.S)


def test_help_waits_for_no_model_class_and_has_the_defaults_of_a_preset(printed):
    helps = printed[1:]
    assert len(helps) == len(COMMANDS) and all("--seed" in text and loaded == "" for text, loaded in helps)
    assert "(default: 0.075)" in " ".join(helps[-1][0].split())


@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=SCRIPTS)
def test_the_algorithms_flags_come_first_and_a_default_is_told_once(number, printed):
    lines = [line.strip("│ ") for line in printed[1 + number][0].partition("options")[2].splitlines()]
    _, *told = "\n".join(lines).split("\n--")  # before the first stands -h
    flags = [re.match("[a-zA-Z-]+", flag)[0] for flag in told]
    own, shared = flags.index("N" if SCRIPTS[number].startswith("bon") else "k"), flags.index("model")
    assert own < flags.index("lr") < shared < flags.index("data") < flags.index("run-name")
    assert len(flags) > 30 and len(set(flags)) == len(flags) and "files" not in flags
    assert all(flag.count("(default") == (name != "resume") for name, flag in zip(flags, told))
    assert not re.search(r"default: (None)?\)", " ".join(" ".join(told).split()))


def test_estimators_are_imported_without_what_a_run_needs(printed):
    """Where torch, transformers, datasets and tqdm are all that is installed, and on Windows, which has no resource."""
    assert printed[0] == ("[[0.6666666865348816, 0.0, 0.0]]\n", "")
