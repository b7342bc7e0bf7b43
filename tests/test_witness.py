"""benchmarks/witness.py: TRL's runs on small ones, and the table of differences."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, save_untrained
from transformers import AutoModelForCausalLM

from verifiers import Verdict

pytest.importorskip("trl", reason="trl is not installed: pip install -r benchmarks/requirements.txt")
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "recipes")]
witness = importlib.import_module("witness")
reproduce = witness.reproduce


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two steps of four prompts; any response is worth its number of digits. Returns the initial policy's folder."""
    initial = save_untrained(tmp_path / "initial")
    flags = "--steps 2 --prompts-per-step 4 --n 4 --lr 1e-2 --max-grad-norm 0.5"
    monkeypatch.setattr(
        reproduce, "command", lambda name, seed="S": f"pass_at_k_pg.py {flags} --k 2 --model {initial} --seed {seed}"
    )
    return initial


def test_trl_is_given_the_problems_and_the_optimiser_of_our_run(small, monkeypatch, tmp_path):
    import trl_k_sample

    seen, task = {"problems": []}, reproduce.lines_task()

    def verify(problems, responses):
        seen["problems"].append(problems)
        rewards = torch.tensor([[float(sum(map(str.isdigit, x))) for x in row] for row in responses])
        return Verdict(rewards, torch.zeros(rewards.shape, dtype=torch.int64))

    class Watched(trl_k_sample.KSampleTrainer):
        def train(self):
            super().train()
            seen["trainer"] = self

    monkeypatch.setattr(task, "verify", verify)
    monkeypatch.setattr(trl_k_sample, "KSampleTrainer", Watched)
    witness.train_by_trl("k8", 3, tmp_path / "policy")
    for step, problems in enumerate(seen["problems"]):
        assert problems == witness.training_batch(task.train, step, 4, 3)
    assert len(seen["problems"]) == 2
    groups = seen["trainer"].optimizer.param_groups
    ours = torch.optim.AdamW([torch.zeros(1)], lr=1e-2, weight_decay=0.0, fused=True).defaults  # as harness/run.py
    assert all(
        group[name] == ours[name] for group in groups for name in ("lr", "betas", "eps", "weight_decay", "amsgrad")
    )
    assert seen["trainer"].args.max_grad_norm == 0.5 and seen["trainer"].advantages.keywords["k"] == 2
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (small, tmp_path / "policy"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_table_is_of_seeds_that_both_have(small, monkeypatch, tmp_path, capsys):
    """Ours .5 + k/1000 and TRL's .01 and .03 above it: .02 ± 12.706 x .01 = .127."""
    args = witness.Args(seeds=4, out=tmp_path / "trl", ours=tmp_path / "ours", report=True)
    witness.main(args)
    assert "nothing to compare yet" in capsys.readouterr().out
    above = {0: 0.01, 2: 0.03, 3: 9.0}  # ours lacks seed 3
    for seed in (0, 1, 2):
        folder = reproduce.run_folder(args.ours, "k8", seed)
        folder.mkdir(parents=True)
        values = {f"pass@{k}": {"all": 0.5 + k / 1000} for k in witness.TRIES}
        (folder / "exact.json").write_text(json.dumps({"held-out": values}))
    for seed in above:
        witness.run_folder(args.out, "k8", seed).mkdir(parents=True)
    folders = {witness.run_folder(args.out, "k8", seed): x for seed, x in above.items()}
    monkeypatch.setattr(witness, "passes", lambda folder: [0.5 + k / 1000 + folders[folder] for k in witness.TRIES])
    witness.main(args)
    assert "farthest end of an interval: 0.1471, bar <= 0.02: NOT met" in capsys.readouterr().out
    rows = json.loads((args.out / "witness.json").read_text())["results"]["rows"]
    assert [row["metric"] for row in rows] == [f"pass@{k}" for k in witness.TRIES] and rows[0]["seeds"] == [0, 2]
    np.testing.assert_allclose([row["difference"] for row in rows], 0.02)
    np.testing.assert_allclose([row["ci95"] for row in rows], 0.12706)
