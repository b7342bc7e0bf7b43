"""What benchmarks/variance.py is made of, against enumeration."""

import dataclasses

import pytest
import torch
import variance

import harness.policy
from verifiers import load_task, suspects


@pytest.mark.parametrize("case", variance.CASES.values(), ids=variance.CASES)
def test_bias_and_variance_of_each_estimator(case):
    """What is called unbiased is; more subsets of the same samples never raise the variance."""
    moments = variance.bandit_moments(*case)
    for name in ("no baseline, n = k", "unbiased, n = k", "unbiased, n > k"):
        assert moments[name][0] < 1e-12
    assert moments["biased, n = k"][0] == pytest.approx(moments["biased, n > k"][0]) and moments["mean"][0] > 0.05
    for name in ("unbiased", "biased"):
        assert moments[f"{name}, n > k"][2] < moments[f"{name}, n = k"][2]
    assert moments["unbiased, n = k"][2] < moments["no baseline, n = k"][2]


def test_moments_by_hand():
    """One sample, A = (1, 0), p = (.8, .2): g = (.2, -.2) with chance .8, else 0; grad pass@1 = (.16, -.16)."""
    theta = torch.tensor([0.8, 0.2], dtype=torch.float64).log().requires_grad_()
    reward = torch.tensor([1.0, 0], dtype=torch.float64)
    found = variance.moments(theta, lambda pi: pi[0], lambda y: reward[y], 1)
    assert found == pytest.approx((0, 0, 0.5), abs=1e-12)  # sqrt(.8 x .2) x .2 / .16
    halved = variance.moments(theta, lambda pi: pi[0], lambda y: reward[y] / 2, 1)
    assert halved == pytest.approx((0.5, 0, 0.25), abs=1e-12)


@pytest.mark.parametrize("name", variance.TIES)
def test_only_leave_one_out_is_unbiased_where_the_failure_rate_is_estimated(name):
    """The closed forms are unbiased where it is known (test_best_of_n.py)."""
    (bias, *_), (of_known, *_) = (variance.tie_moments(0.9, 4, name, known) for known in (False, True))
    assert of_known < 1e-12 and (bias < 1e-12 if name == "exact" else bias > 0.05)


def test_mean_estimates_on_the_network(monkeypatch):
    """As functions of the chance p of being right: dJ/dp = k (1-p)^(k-1) for pass@k. Of n = 16, with p estimated. The
    policy is small and knows the names of four prompts somewhat."""
    problems = [next(p for p in variance.optima.problems_of() if p.level == level) for level in (2, 3, 4, 5)]
    groups, recipe = [suspects.candidates(problem) for problem in problems], {"steps": 20, "batch": 8, "lr": 1e-2}
    task = dataclasses.replace(load_task("suspects"), train=[], warm_start_problems=groups, warm_start=recipe)
    monkeypatch.setattr(harness.policy, "TINY", harness.policy.TINY | {"hidden_size": 32, "num_hidden_layers": 2})
    found = variance.network_moments(harness.policy.warm_start(task), task, problems)
    for name, (bias, cosine) in found.items():
        assert (bias < 1e-6) == ("N =" not in name), name
    assert found["unbiased, k = 8"][1] == pytest.approx(1) and found["mean"][1] < 0.999
