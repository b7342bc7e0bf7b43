"""golden.json, whose advantages come from exact fractions, against the command that made it, the estimators, and the
regions marked `copy this` as their reader has them."""

import ast
import importlib
import json
import re

import golden
import pytest
import torch
from runs import ROOT

CASES = json.loads(golden.FILE.read_text())
REGION = r"^# --- copy this, with ([^-]*?) -+\n(.*?)^# -{100,}$"
REGIONS = {"pass_at_k_pg": 16, "majority_pg": 7, "bon_rl": 16, "bon_sft": 4, "bandit": 6}  # script -> golden cases


def check(function, arguments: dict, result: list) -> None:
    tensors = {x: torch.tensor(v).double() if isinstance(v, list) else v for x, v in arguments.items()}
    if "votes" in tensors:
        tensors["votes"] = tensors["votes"].long()
    expected = torch.tensor(result, dtype=torch.float64)
    torch.testing.assert_close(function(**tensors), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['function']}-{list(case['arguments'].values())[1:]}")
def test_an_estimator_is_what_the_file_says(case):
    module, _, name = case["function"].rpartition(".")
    check(getattr(importlib.import_module(module), name), case["arguments"], case["result"])


def test_the_command_makes_the_file():
    assert golden.cases() == CASES


@pytest.mark.parametrize("script", REGIONS)
def test_a_region_runs_with_what_its_heading_names_and_needs_all_of_it(script):
    """Beside these functions of common.py its reader has `import math, torch` and nothing else."""
    ((heading, region),) = re.findall(REGION, (ROOT / f"{script}.py").read_text(), re.M | re.S)
    source, heading = (ROOT / "common.py").read_text(), " ".join(heading.replace("#", "").split())
    names = re.split(", | and ", heading.removesuffix(" of common.py"))
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    code = "\n\n".join([*(ast.get_source_segment(source, functions[name]) for name in names), region])
    nodes = [*ast.walk(ast.parse(code))]
    assert {*names} <= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
    exec(code, copied := {"math": importlib.import_module("math"), "torch": torch})
    own = [case for case in CASES if case["function"].startswith(f"{script}.")]
    if script == "bandit":  # pass@k's estimators, for n = k
        found = (case for case in CASES if case["function"] == "pass_at_k_pg.advantages")
        rows = [(case["arguments"].copy(), case["result"]) for case in found]
        rows = [(x, A) for x, A in rows if x.pop("k") == 6 or x["estimator"] == "mean"]
        own = [{"function": "bandit.advantages", "arguments": x, "result": A} for x, A in rows]
    assert len(own) == REGIONS[script]
    for case in own:
        check(copied[case["function"].partition(".")[2]], case["arguments"], case["result"])
