"""The regions marked `copy this`: each is cut out of its file and run with the functions that its heading names and
nothing else, as its reader would."""

import ast
import json
import re

import pytest
from runs import ROOT, WITHOUT, python

REGION = r"^# --- copy this, with ([^-]*?) -+\n(.*?)^# -{100,}$"
# torch with what it brings, and the standard library
ONLY_TORCH = "import json, runpy, sys, torch" + WITHOUT.format('not in {"torch", *sys.stdlib_module_names}')
CHECK = """
import json
for case in json.load(open("{}.json")):
    exact = lambda v: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v
    arguments = dict((x, exact(v)) for x, v in case["arguments"].items())
    if "votes" in arguments:
        arguments["votes"] = arguments["votes"].long()
    result = globals()[case["function"]](**arguments)
    assert torch.allclose(result, torch.tensor(case["result"], dtype=torch.float64), rtol=1e-12, atol=1e-14), case
    print(case["function"])
"""


def golden(script: str) -> list[dict]:
    """The cases of tests/golden.json for the functions of a script, as calls of what stands in its region. bandit.py
    has pass@k's estimators by their names, for n = k."""
    cases, own = json.loads((ROOT / "tests" / "golden.json").read_text()), []
    for case in cases:
        (module, _, function), arguments = case["function"].rpartition("."), dict(case["arguments"])
        if (script, module) == ("bandit", "pass_at_k_pg"):
            k, estimator = arguments.pop("k"), arguments["estimator"]
            module = script if k == len(arguments["rewards"][0]) or estimator == "mean" else module
        if module == script:
            own.append({"function": function, "arguments": arguments, "result": case["result"]})
    return own


def copied(script: str) -> tuple[str, list[str]]:
    """What a reader copies: `import math, torch`, the named functions of common.py, and the region; and their names."""
    ((heading, region),) = re.findall(REGION, (ROOT / f"{script}.py").read_text(), re.M | re.S)
    source, heading = (ROOT / "common.py").read_text(), " ".join(heading.replace("#", "").split())
    names = re.split(", | and ", heading.removesuffix(" of common.py"))
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    pieces = [ast.get_source_segment(source, functions[name]) for name in names]
    return "\n\n".join(["import math, torch", *pieces, region]), names


REGIONS = {"pass_at_k_pg": 16, "majority_pg": 7, "bon_rl": 16, "bon_sft": 4, "bandit": 6}  # script -> golden cases


def test_a_region_runs_with_what_its_heading_names(tmp_path):
    """All regions run in one process, each in a module of its own."""
    for script, count in REGIONS.items():
        cases, (code, _) = golden(script), copied(script)
        assert len(cases) == count
        (tmp_path / f"{script}.json").write_text(json.dumps(cases))
        (tmp_path / f"{script}.py").write_text(code + CHECK.format(script))
    runs = "".join(f'runpy.run_path("{script}.py")\n' for script in REGIONS)
    (tmp_path / "all.py").write_text(ONLY_TORCH + runs)
    assert len(python("-I", "all.py", cwd=tmp_path).splitlines()) == sum(REGIONS.values())


@pytest.mark.parametrize("script", REGIONS)
def test_a_heading_names_nothing_that_is_not_needed(script):
    code, names = copied(script)
    loaded = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert set(names) <= loaded
