"""golden.json, whose advantages come from exact fractions, against the estimators and the command that made it."""

import importlib
import json
import sys
from collections import Counter

import pytest
import torch
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
golden = importlib.import_module("golden")
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


def test_the_file_has_every_estimator_ties_and_more_samples_than_k():
    seen = Counter((case["function"], case["arguments"].get("estimator")) for case in CASES)
    for name in ("mean", "unbiased", "biased", "maxrl"):
        assert seen["pass_at_k_pg.advantages", name] >= 2
    assert len([key for key in seen if key[0] == "bon_rl.advantages"]) == 6
    ks = {case["arguments"].get("k") for case in CASES if case["function"] == "pass_at_k_pg.advantages"}
    assert ks == {2, 3, 6}  # n is 6


def test_numbers_by_hand():
    """One right of six, k = 2, unbiased: of the 5 pairs with it each is worth 1 - 0; A = (2/6) 1. lambda_2 = 2.2886."""
    case = next(c for c in CASES if c["arguments"].get("k") == 2 and c["arguments"].get("estimator") == "unbiased")
    assert case["result"][0] == [1 / 3, 0, 0, 0, 0, 0]
    assert float(golden.tilt(2)) == pytest.approx(2.2886, abs=5e-5)
    assert float(golden.tilt(32)) == pytest.approx(33.0158, abs=5e-5)
