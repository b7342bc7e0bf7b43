"""Advantages of other papers, as they are written there but divided by n, for --estimator FILE:NAME; k is not read."""


def reinforce(rewards, k):
    return rewards / rewards.shape[-1]


def dr_grpo(rewards, k):
    return (rewards - rewards.mean(-1, keepdim=True)) / rewards.shape[-1]


def grpo(rewards, k):  # without the epsilon; a group whose rewards are all alike has advantages 0
    deviation = rewards.std(-1, keepdim=True)  # (B, 1), of n - 1 degrees of freedom
    return (rewards - rewards.mean(-1, keepdim=True)) / deviation.where(deviation > 0, 1) / rewards.shape[-1]


def rs_grpo(rewards, k, beta=1.0):
    e = (beta * rewards).exp()
    return (e / e.mean(-1, keepdim=True) - 1) / beta / rewards.shape[-1]
