"""What benchmarks/variance.py and vote.py are made of, against enumeration."""

import importlib
import itertools
import sys

import pytest
import torch
from enumeration import majority_value
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
variance, vote = importlib.import_module("variance"), importlib.import_module("vote")


@pytest.mark.parametrize("case", variance.CASES.values(), ids=variance.CASES)
def test_bias_and_variance_of_each_estimator(case):
    """Those that are called unbiased are; more subsets of the same samples never raise the variance."""
    moments = variance.bandit_moments(*case)
    for name in ("no baseline, n = k", "unbiased, n = k", "unbiased, n > k"):
        assert moments[name][0] < 1e-12
    assert moments["biased, n = k"][0] == pytest.approx(moments["biased, n > k"][0]) and moments["mean"][0] > 0.05
    for name in ("unbiased", "biased"):
        assert moments[f"{name}, n > k"][2] < moments[f"{name}, n = k"][2]
    assert moments["unbiased, n = k"][2] < moments["no baseline, n = k"][2]


def test_exact_majority_is_its_expectation():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for votes in itertools.product(range(3), repeat=4):
        expected += p[:, votes].prod(-1) * majority_value([(vote, float(vote == 0)) for vote in votes])
    torch.testing.assert_close(vote.majority(p, 4), expected)
