"""docs/engines.md is what benchmarks/engines.py measures in an environment that has the engine; see its first lines."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # what conftest.py does elsewhere: this file runs without it, too
engines = importlib.import_module("engines")


def in_document(engine: str) -> str:
    return engines.measure.published(engine, engines.PAGE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_tables_of_the_page_are_measured_again(engine):
    """In a process of its own: engines change what they import."""
    if not importlib.util.find_spec(engine):
        pytest.skip(f"{engine} is not installed: see the top of benchmarks/engines.py")
    code = f"import engines; print(engines.tables({engine!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(in_document(engine)), result.stdout


def in_groups(rewards, mask, index):
    """A rule of token-level rewards: (r - mean) for each group, at all tokens."""
    total, same = rewards.sum(-1), torch.tensor(index[:, None] == index).to(rewards)  # (R,), (R, R)
    return (total - same @ total / same.sum(-1)).unsqueeze(-1) * mask


def by_length(rewards, mask, index):
    """The same less a mean that is weighted by lengths."""
    total, length, same = rewards.sum(-1), mask.sum(-1).to(rewards), torch.tensor(index[:, None] == index).to(rewards)
    return (total - same @ (total * length) / (same @ length)).unsqueeze(-1) * mask


def test_a_row_of_the_table():
    name, D, w, words, remark = engines.row("mine", engines.of_tokens(in_groups), True)
    assert (name, words, remark) == ("mine", "7/8 of the gradient of pass@1", "")
    assert D == " ".join(["0.109"] * 8) and w.startswith("0.875 0.000")
    seen = []
    engines.of_tokens(lambda r, mask, index: seen.append(r) or mask)(torch.tensor([[1.0, 3, 5]], dtype=torch.float64))
    assert seen[0].tolist() == [[1, 0, 0], [0, 3, 0], [0, 0, 5]]  # at the last token of 1, 2 and 3
    *_, words, remark = engines.row("mine", engines.of_tokens(by_length), True)
    assert words == "7/8 of the gradient of pass@1" and "equally long" in remark
    *_, words, remark = engines.row("mine", engines.of_tokens(by_length), False)
    assert words == "refused" and remark.startswith("not symmetric")
    assert engines.row("mine", "takes values", True)[3:] == ["not run", "takes values"]

    def whitened(rewards, mask, index):
        total = rewards.sum(-1)
        return ((total - total.mean()) / (total.std() + 1e-6)).unsqueeze(-1) * mask

    assert engines.row("mine", engines.of_tokens(whitened), True)[3:] == [
        "refused", "dependent on the other rows of the batch"
    ]  # fmt: skip
    tokens = engines.row("mine", engines.of_tokens(lambda r, mask, index: r), True)
    assert tokens[3:] == ["refused", "tokens of one response have different advantages"]


def test_the_rules_of_a_registry():
    """A flag makes two rules; what a trainer passes on is passed on; a rule that needs more is named and not run."""

    def flagged(token_level_rewards, response_mask, index, by_std=True):
        return (in_groups(token_level_rewards, response_mask, index) * (2 if by_std else 1),)

    def discounted(token_level_rewards, response_mask, gamma, **kwargs):
        return (in_groups(token_level_rewards, response_mask, kwargs["index"]) * gamma,)

    def valued(token_level_rewards, response_mask, index, values, gamma):
        raise AssertionError

    functions = {"flagged": flagged, "discounted": discounted, "valued": valued}
    rules = engines.registered(functions, "by_std", lambda name, by_std: {"gamma": 4.0})
    assert rules.pop("valued") == "takes more than outcome rewards: values"
    assert list(rules) == ["flagged, by_std=True", "flagged, by_std=False", "discounted"]
    rewards = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    assert [rule(rewards)[0, 0].item() for rule in rules.values()] == [2 * 0.75 / 4, 0.75 / 4, 4 * 0.75 / 4]


def test_what_a_loss_makes_of_a_token():
    mask = engines.TOKENS  # lengths 1, 3, 2, 1
    assert engines.token_weights(-mask / 7).startswith("1 / all tokens")
    assert engines.token_weights(-mask / 4).startswith("1 / rows")
    assert engines.token_weights(-mask / 12).startswith("1 / (rows x longest")
    assert engines.token_weights(-mask / mask.sum(-1, keepdim=True) / 4).startswith("1 / (rows x own length)")
    prompt = torch.tensor([[4.0], [4], [3], [3]])
    assert engines.token_weights(-mask / (2 * prompt)).startswith("1 / (prompts x all tokens")
    assert engines.token_weights(-mask / 5).startswith("something else")


def test_the_doc_example_returns_what_the_table_ran():
    """The ten lines beside the table, with a verifier that compares."""
    text = (ROOT / engines.PAGE).read_text()
    code = text.partition("```python\n")[2].partition("\n\n\ntrainer")[0]
    from pass_at_k_pg import advantages

    names = {"torch": torch, "advantages": advantages, "verify": lambda c, a: c == a}
    exec(code, names)
    answers = ["x"] * 16
    completions = ["x", *"abcdefg", "x", "x", *"abcdef"]
    values = torch.tensor(names["pass_at_4"](completions, answers)).view(2, 8)
    rewards = torch.tensor([[1.0] + [0] * 7, [1.0, 1] + [0] * 6])
    torch.testing.assert_close(values, 8 * advantages(rewards, 5, "biased"))
