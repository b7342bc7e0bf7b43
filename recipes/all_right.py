"""pass^k, the chance that all of k tries are right: an objective of three lines, for --estimator FILE:NAME."""

from common import k_sample_advantages, pass_at_k


def metric(rewards, k):
    return -pass_at_k(-rewards, k)


def all_right(rewards, k):
    return k_sample_advantages(metric, rewards, k=k)
