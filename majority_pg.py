"""Policy gradient for majority voting: train a language model so that the most frequent of k answers is right.

Tang, Zheng, Synnaeve, Munos. Optimizing Language Models for Inference Time Objectives using Reinforcement Learning.
ICML 2025, arXiv 2503.19595. The objective, over k independent responses to a prompt with final answers a_1..a_k,

    J_k = E_x E_{y_1..y_k ~ pi(.|x)} [ r(maj(a_1, .., a_k)) ]        (maj@k; a tied vote is worth the mean of the tied)

and its gradient estimate, sum_i A_i grad log pi(y_i), with the leave-one-out advantages of their Lemma 1,

    A_i = r(maj(a_1..a_k)) - r(maj(a_{-i}))

so a response matters only where taking its vote away changes the outcome. What differs from pass_at_k_pg.py: the
advantages below, which read votes as well as rewards, and the curves. The reward of the vote is that of a verifier with
the right answer; "agree with the vote" as a reward is another objective, see README.

    python majority_pg.py --k 8                      # biased: the gradient of maj@7
    python majority_pg.py --k 8 --estimator mean     # the baseline
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import pad
from tqdm import tqdm

import common
from verifiers import load_task


@dataclass
class Args:
    k: int = 8
    """votes that the objective counts"""
    n: int | None = None
    """samples per prompt, at least k; more than k lowers the variance, by averaging over all k-subsets (default: k or
    16, whichever is more; the papers' setting is n = k)"""
    estimator: Literal["mean", "unbiased", "biased"] = "biased"
    """mean reward (RLOO, the baseline); maj@k; maj@k centred, which is the gradient of maj@(k-1)"""
    model: str = "tiny"
    """"tiny" (embedded, about 1M parameters), or a Hugging Face causal LM: hub id or folder"""
    task: str = "chain"
    """which problems and verifier, see verifiers/"""
    data: str | None = None
    """a local file or folder with the task's problems, instead of its default source"""
    sandbox: str = "auto"
    """for tasks that run programs: auto, bubblewrap, landlock or rlimits, see verifiers/sandbox.py"""
    levels: tuple[int, ...] = ()
    """difficulty levels to train on (default: all)"""
    steps: int = 100
    """optimisation steps; 0 only evaluates"""
    prompts_per_step: int = 32
    """prompts in a step; it samples n times as many responses"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    temperature: float = 1.0
    """sampling temperature, in training (of the differentiated log-probs, too) and in evaluation"""
    max_new_tokens: int | None = None
    """longest response in tokens (default: the task's)"""
    kl_coef: float = 0.0
    """beta of -beta KL(policy || initial policy), added to the objective"""
    epochs: int = 1
    """optimiser steps on the same rollouts; PPO clipping applies from 2 on"""
    clip: float = 0.2
    """epsilon of PPO clipping"""
    max_grad_norm: float = 1.0
    """longest gradient that is not scaled down"""
    micro_batch_tokens: int = 16384
    """tokens in one forward and backward pass; lower it when memory runs out, the gradient stays the same"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    device: str = "auto"
    """auto, cpu or cuda"""
    fsdp: bool = False
    """under torchrun: spread the policy over the processes (FSDP2), for models that do not fit one device"""
    show_prompt: bool = False
    """print the first training prompt as the policy reads it, and stop"""
    show_samples: int = 0
    """responses to held-out problems to print with their rewards, escaped, at each evaluation"""
    save_every: int = 50
    """steps between checkpoints; the last two are kept"""
    resume: str | None = None
    """runs/<name>: go on with that run, from its last checkpoint and with its arguments"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard (an optional dependency)"""
    seed: int = 0
    """of the order of problems and of sampling"""
    eval_every: int = 50
    """steps between evaluations on held-out problems; 0: only before and after"""
    eval_n: int = 32
    """samples per problem in evaluation; maj@1 to maj@eval_n are reported, and pass@1 to pass@eval_n"""
    eval_problems: int = 400
    """held-out problems per level"""
    run_name: str | None = None
    """folder under runs/ (default: made from the arguments)"""


# --- copy this -------------------------------------------------------------------------------------------------------


def advantages(votes: torch.Tensor, rewards: torch.Tensor, k: int, estimator: str = "unbiased") -> torch.Tensor:
    """Advantages A of the maj@k policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over the n samples.

    votes: (B, n) int64, n >= k, equal = same answer, -1 = none (casts no vote). rewards: (B, n), a function of the
    answer (where it is not, an answer's mean reward counts). Returns (B, n), of the dtype of rewards (float32 for
    integers and bools).
      mean      A_i = (1/n) (r_i - mean_{j != i} r_j)                                                        (RLOO)
      unbiased  A_i = (k/n) mean over k-subsets T containing i of [ f(T) - f(T without i) ]             (n = k: Tang)
      biased    the same less the subset's mean advantage (Tang); its expectation is the gradient of maj@(k-1)
    where f is the reward of the majority: ties are split, no votes at all are worth 0. With k = 1 the vote is the
    response's own: unbiased is mean over responses with an answer, and biased is zero.
    Raises ValueError unless 1 <= k <= n, for rewards that are not finite, and for an unknown estimator.

    With M_j the mean of f over the j-subsets of all samples, and M_j(-i) over those without i,

      unbiased  A_i = M_k - (1 - k/n) M_k(-i) - (k/n) M_{k-1}(-i)
      biased    A_i = M_{k-1} - M_{k-1}(-i)
    """
    n, rewards = rewards.shape[-1], rewards if rewards.is_floating_point() else rewards.float()
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite: see (prompt, sample) {(~rewards.isfinite()).nonzero()[0].tolist()}")
    if estimator == "unbiased" and k == 1:
        estimator, rewards = "mean", rewards.masked_fill(votes < 0, 0)
    if estimator == "mean":
        if n == 1:
            return rewards.clone()
        rewards = rewards - rewards[..., :1]  # changes nothing, but makes equal rewards exact zeros, which cost nothing
        return (rewards - rewards.mean(-1, keepdim=True)) / (n - 1)
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"unknown estimator {estimator!r}: choose mean, unbiased or biased")
    everyone, without = subset_majorities(votes, rewards, k, leave_out=True)  # (B, 2), (B, n, 2): k and k-1
    everyone = everyone.unsqueeze(1)  # (B, 1, 2)
    if estimator == "unbiased":
        A = everyone[..., 0] - (1 - k / n) * without[..., 0] - k / n * without[..., 1]
    else:
        A = everyone[..., 1] - without[..., 1]
    # Differences of sums: what rounding leaves of an exact zero (1e-15) is made zero, so that its row costs nothing.
    A = A.masked_fill(A.abs() < 1e-12 * rewards.double().abs().amax(-1, keepdim=True).clamp(min=1e-300).cpu(), 0)
    return A.to(rewards)


def majority_at_k(votes: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """maj@k: the reward of the most voted answer, its mean over all k-subsets of n samples, exactly.

    votes: (B, n) int64, equal = same answer, -1 = no answer (casts no vote; no votes at all are worth 0).
    rewards: (B, n), a function of the answer; where it is not, the mean reward of the answer's samples counts.
    Ties are split: the mean over the tied answers. Returns (B,) float64. Raises ValueError unless 1 <= k <= n.
    """
    return subset_majorities(votes, rewards, k)[0][:, 0]


def subset_majorities(votes: torch.Tensor, rewards: torch.Tensor, k: int, leave_out: bool = False):
    """The majority objective averaged over subsets, by counting per answer: no enumeration, n and k in the hundreds.

    votes, rewards: see `majority_at_k`. Returns (all, without), float64: all (B, 2), the means over the k-subsets and
    over the (k-1)-subsets of the n samples; without (B, n, 2), the same among the n - 1 samples other than the i-th
    (where k = n, both over k-1), or None unless leave_out. The empty vote is worth 0.

    A k-subset takes from an answer with c votes a binomial number of them, conditioned on the subset's size: let
    f_c(u) = C(c,u) p^u (1-p)^(c-u) for any p (it cancels; p near k/n keeps the numbers tame). Answer a wins with t
    votes if all others have fewer, and shares 1/(1+s) with s others that also have t. As 1/(1+s) = int_0^1 z^s dz,

        f_n(k) E[f] = sum_t int_0^1 dz [x^k] sum_a r_a f_a(t) x^t prod_{b!=a} (sum_{u<t} f_b(u) x^u + z f_b(t) x^t)

    The integral is exact by Gauss-Legendre quadrature, [x^k] by evaluation at the (n+1)-th roots of unity, the sum over
    a by dual numbers (F_b + eps r_b f_b(t) x^t), and answers with equal votes and rewards share one factor.
    """
    B, n = votes.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    float64 = torch.float64
    votes, rewards = votes.cpu(), rewards.cpu().to(float64)
    # Group the answers that have the same number of votes and the same reward: D groups at most in a row.
    same = votes.unsqueeze(-1) == votes.unsqueeze(-2)  # (B, n, n)
    blank = votes < 0  # no answer: counted as a group without votes that fills subsets but never wins
    count = same.sum(-1).masked_fill(blank, 0)  # (B, n)
    value = ((same * rewards.unsqueeze(-2)).sum(-1) / same.sum(-1)).masked_fill(blank, 0)  # (B, n)
    order = value.argsort(dim=-1, stable=True)
    order = order.gather(-1, count.gather(-1, order).argsort(dim=-1, stable=True))  # by count, then by value
    new = (count.gather(-1, order).diff(dim=-1) != 0) | (value.gather(-1, order).diff(dim=-1) != 0)
    group = torch.empty_like(votes).scatter_(-1, order, pad(new.cumsum(-1), (1, 0)))  # (B, n)
    zeros = torch.zeros(B, int(group.max()) + 1, dtype=float64)  # (B, D)
    c = zeros.long().scatter_(-1, group, count)
    r = zeros.scatter(-1, group, value)
    size = (zeros.scatter_add(-1, group, torch.ones_like(value)) / c.clamp(min=1)).round().long().masked_fill(c == 0, 0)
    blanks = blank.sum(-1)  # (B,)
    # Tables over vote counts: f_c(u) x^u and the sums below u, at P = (n+1)//2 + 1 roots; the others are conjugates.
    p = k / (n + 1)
    u = torch.arange(k + 1, dtype=float64)
    counts = torch.arange(int(c.max()) + 1, dtype=float64).unsqueeze(-1)  # (C, 1)
    left = (counts - u).clamp(min=0)
    log_f = (counts + 1).lgamma() - (u + 1).lgamma() - (left + 1).lgamma() + u * math.log(p) + left * math.log1p(-p)
    f = log_f.exp().where(u <= counts, 0)  # (C, k+1)
    angle = 2 * math.pi * torch.arange((n + 1) // 2 + 1, dtype=float64) / (n + 1)
    root = torch.polar(torch.ones_like(angle), angle)  # (P,)
    term = f.unsqueeze(-1) * root ** u.unsqueeze(-1)  # (C, k+1, P)
    below = pad(term.cumsum(1), (0, 0, 1, 0))  # (C, k+2, P)
    # Nodes: a winning number of votes t, and quadrature points z enough for as many ties as can occur.
    nodes = []
    for t in range(1, min(k, int(c.max())) + 1):
        rivals = min(k // t, int((size * (c >= t)).sum(-1).max())) - 1
        z, w = np.polynomial.legendre.leggauss(max(rivals, 0) // 2 + 1)
        nodes += [(t, (1 + z_q) / 2, w_q / 2) for z_q, w_q in zip(z, w)]
    t, z, w = (torch.tensor(column, dtype=float64) for column in zip(*nodes or [(1, 0, 0)]))  # (Q,) each
    tie = term[:, t.long()]  # (C, Q, P)
    factor = below[:, t.long()] + z.unsqueeze(-1) * tie  # (C, Q, P)

    def expectations(polynomial: torch.Tensor, m: int) -> torch.Tensor:
        """(B, Q, P) values at the roots -> (B, 2): coefficients k and k-1, each over that of all m samples' votes."""
        values = (w.unsqueeze(-1) * polynomial).sum(1)  # (B, P)
        values[:, 1 : (n + 2) // 2] *= 2  # those that stand for two conjugate roots
        sizes = [min(k, m), k - 1]
        log_total = [math.lgamma(m + 1) - math.lgamma(j + 1) - math.lgamma(m - j + 1) for j in sizes]
        total = [math.exp(log + j * math.log(p) + (m - j) * math.log1p(-p)) for log, j in zip(log_total, sizes)]
        coefficient = torch.stack([root**-j for j in sizes], -1)  # (P, 2)
        return (values @ coefficient).real / (n + 1) / torch.tensor(total, dtype=float64)

    def product(a, b):
        return a[0] * b[0], a[0] * b[1] + a[1] * b[0]

    def group_product(g: int, m: torch.Tensor):
        """Dual number (each part (B, Q, P)) of m answers (B,) of group g: F^m and m r f_c(t) x^t F^(m-1)."""
        base, power, odd = factor[c[:, g]], 1, (m - 1).clamp(min=0)
        while odd.any():  # F^(m-1) by squaring: complex pow is slow, and NaN at 0 ** 0
            power = torch.where((odd % 2 == 1).view(-1, 1, 1), power * base, power)
            base, odd = base * base, odd // 2
        eps = (m * r[:, g]).view(-1, 1, 1) * tie[c[:, g]] * power
        return torch.where((m > 0).view(-1, 1, 1), power * factor[c[:, g]], 1), eps

    def blank_product(m: torch.Tensor) -> torch.Tensor:
        return (1 - p + p * root) ** m.view(-1, 1, 1)  # (B, 1, P)

    one = (torch.ones((), dtype=torch.complex128), torch.zeros((), dtype=torch.complex128))
    groups = [group_product(g, size[:, g]) for g in range(c.shape[1])]
    before = list(itertools.accumulate(groups, product, initial=one))  # before[g]: product of the groups before g
    everyone = expectations(before[-1][1] * blank_product(blanks), n)  # (B, 2)
    if not leave_out:
        return everyone, None
    after = list(itertools.accumulate(groups[::-1], product, initial=one))[::-1]  # after[g]: of g and those behind it
    without = []
    for g in range(c.shape[1]):  # one answer of group g loses one vote
        others = product(product(before[g], after[g + 1]), group_product(g, size[:, g] - 1))
        fewer = (c[:, g] - 1).clamp(min=0)
        polynomial = product(others, (factor[fewer], r[:, g].view(-1, 1, 1) * tie[fewer]))[1] * blank_product(blanks)
        one_blank_less = before[-1][1] * blank_product((blanks - 1).clamp(min=0))
        without.append(expectations(torch.where((c[:, g] > 0).view(-1, 1, 1), polynomial, one_blank_less), n - 1))
    return everyone, torch.stack(without, 1).gather(1, group.unsqueeze(-1).expand(-1, -1, 2))  # (B, D, 2) -> (B, n, 2)


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.n = max(args.k, 16) if args.n is None else args.n
    common.check_args(args)
    task = load_task(args.task, args.data, args.sandbox)
    args.max_new_tokens = task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    test_problems = common.evaluation_problems(common.problems_at(task.test, (), "held-out"), args.eval_problems)
    train_problems = common.problems_at(task.train, args.levels, "training") if args.steps else test_problems
    device = "cpu" if args.fsdp else args.device  # common.shard moves it, layer by layer
    policy = common.load_policy(args.model, task, device, args.gradient_checkpointing)
    if args.show_prompt:
        print(policy.tokenizer.decode(common.encode_prompts(policy, task, train_problems[:1], args.max_new_tokens)[0]))
        return
    for problems in (train_problems, test_problems):
        if isinstance(problems, list):  # not made on demand: a prompt that is too long is refused now, not at step 300
            common.encode_prompts(policy, task, problems, args.max_new_tokens)
    reference = copy.deepcopy(policy)  # for the KL
    if args.fsdp:
        common.shard(args.device, policy, reference)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    parts = [args.task, args.model, args.estimator, f"k{args.k}", f"n{args.n}", f"s{args.seed}"]
    run = common.Run(args, parts, policy=policy.model, optimizer=optimizer)

    ks = common.powers_of_two(args.eval_n, args.k)

    def evaluate(step: int) -> dict[str, torch.Tensor]:
        verdict = common.evaluate(policy, task, test_problems, args)
        metrics = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        metrics |= {f"maj@{j}": majority_at_k(verdict.votes, verdict.rewards, j) for j in ks}
        run.progress["history"].append((step, common.by_level(metrics, test_problems)))
        run.log({"step": step, "eval": run.progress["history"][-1][1], **verdict.counts})
        if verdict.counts:
            tqdm.write(f"evaluation at step {step}, events in the verifier: {verdict.counts}")
        return metrics

    if "before" not in run.progress:
        run.progress["before"] = evaluate(0)
    for step in run.steps(f"{args.estimator} k={args.k}"):
        start = time.perf_counter()
        problems = common.share(common.training_batch(train_problems, step - 1, args.prompts_per_step, args.seed))
        prompts = common.encode_prompts(policy, task, problems, args.max_new_tokens)
        generator = common.step_generator(policy.device, args.seed, step)
        rollouts = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
        verdict = common.judged(task, problems, common.decode(policy, rollouts))
        A = advantages(verdict.votes, verdict.rewards, args.k, args.estimator)  # (B, n)
        ratios = common.log_ratios(policy, reference, rollouts if args.kl_coef else rollouts.first(), args)
        if args.kl_coef:
            A = A + args.kl_coef * common.kl_advantages(ratios)
        stats = common.policy_gradient_step(policy, optimizer, rollouts, A, args)
        record = {
            "step": step,
            **common.rollout_metrics(policy, rollouts, verdict, A),
            f"maj@{args.k}": majority_at_k(verdict.votes, verdict.rewards, args.k).mean().item(),
            "kl": common.kl_estimate(ratios),
            **stats,
            **verdict.counts,
        }
        timings = common.step_timings(policy, rollouts, verdict, start)
        run.log(record, timings, ["reward", f"maj@{args.k}", "kl", "signal", *verdict.counts, "tokens_per_s"])
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.progress["after"] = evaluate(step)

    before, after = run.progress["before"], run.progress.get("after")
    if args.steps:
        common.save_policy(policy, run.folder / "policy")
    columns = [*(f"maj@{j}" for j in sorted({1, args.k, args.eval_n})), f"pass@{args.eval_n}"]
    print(common.comparison_table(before, after, test_problems, columns))
    common.save_figure(run.folder, run.progress["history"], run.progress["rewards"], ["pass", "maj"], args.k)
    print(f"{run.folder}: metrics.jsonl, curves.png{', policy/' if args.steps else ''}")


if __name__ == "__main__":
    common.run_cli(main, Args)
