"""golden.json, whose advantages come from exact fractions, against the estimators and the command that made it."""

import importlib
import json

import golden
import pytest
import torch

CASES = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['function']}-{list(case['arguments'].values())[1:]}")
def test_an_estimator_is_what_the_file_says(case):
    module, _, name = case["function"].rpartition(".")
    arguments = {x: torch.tensor(v).double() if isinstance(v, list) else v for x, v in case["arguments"].items()}
    if "votes" in arguments:
        arguments["votes"] = arguments["votes"].long()
    result = getattr(importlib.import_module(module), name)(**arguments)
    expected = torch.tensor(case["result"], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_the_command_makes_the_file():
    assert golden.cases() == CASES
