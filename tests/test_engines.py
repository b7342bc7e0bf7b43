"""docs/engines.md is what benchmarks/engines.py measures in an environment that has the engine; see its first lines."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # what conftest.py does elsewhere: this file also runs without it
engines = importlib.import_module("engines")


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_tables_of_the_page_are_measured_again(engine):
    """They are measured in a process of their own, because engines change what they import."""
    if not importlib.util.find_spec(engine):
        pytest.skip(f"{engine} is not installed: see the top of benchmarks/engines.py")
    command = [sys.executable, "-c", f"import engines; print(engines.tables({engine!r}))"]
    result = subprocess.run(command, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout.strip().endswith(engines.measure.published(engine, engines.PAGE)), result.stdout


def test_the_rules_of_a_registry_are_read_off():
    """Rewards less the mean of their prompt, at all tokens. A flag makes two rules; a rule of values is not run."""

    def centred(token_level_rewards, response_mask, index, by_std=True):
        total, same = token_level_rewards.sum(-1), torch.tensor(index[:, None] == index).double()  # (R,), (R, R)
        return ((total - same @ total / same.sum(-1)).unsqueeze(-1) * response_mask * (2 if by_std else 1),)

    def valued(token_level_rewards, response_mask, values):
        raise AssertionError

    rules = engines.registered({"centred": centred, "valued": valued}, "by_std", lambda *_: {})
    assert list(rules) == ["centred, by_std=True", "centred, by_std=False", "valued"]
    words = [engines.row(name, rule, True)[3] for name, rule in rules.items()]
    assert words == ["7/4 of the gradient of pass@1", "7/8 of the gradient of pass@1", "not run"]
    assert rules["valued"] == "takes more than outcome rewards: values"


def test_the_doc_example_returns_what_the_table_ran():
    """The ten lines beside the table, with a verifier that compares."""
    text = (ROOT / engines.PAGE).read_text()
    code = text.partition("```python\n")[2].partition("\n\n\ntrainer")[0]
    names = {"torch": torch, "advantages": engines.pass_at_k, "verify": lambda c, a: c == a}
    exec(code, names)
    values = torch.tensor(names["pass_at_4"](["x", *"abcdefg", "x", "x", *"abcdef"], ["x"] * 16)).view(2, 8)
    rewards = torch.tensor([[1.0] + [0] * 7, [1.0, 1] + [0] * 6])
    torch.testing.assert_close(values, 8 * engines.pass_at_k(rewards, 5, "biased"))
