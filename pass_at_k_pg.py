"""Policy gradient for pass@k: train a language model to be right at least once in k tries.

Tang, Zheng, Synnaeve, Munos. Optimizing Language Models for Inference Time Objectives using Reinforcement Learning.
ICML 2025, arXiv 2503.19595. The objective, over k independent responses to a prompt,

    J_k = E_x E_{y_1..y_k ~ pi(.|x)} [ max_i r(x, y_i) ]        (pass@k for 0/1 rewards, max@k for real ones)

and its gradient estimate, sum_i A_i grad log pi(y_i), with the leave-one-out advantages of their Lemma 1,

    A_i = max_j r_j - max_{j != i} r_j

What differs from plain policy gradient: (1) the k responses to a prompt are one sample of the objective, never broken
up; (2) the advantages below; (3) nothing is divided by a standard deviation or a length.

    python pass_at_k_pg.py --k 4                      # unbiased; pass@4 rises
    python pass_at_k_pg.py --k 4 --estimator mean     # the baseline: pass@1 rises, pass@32 falls
"""

import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import common
from verifiers import load_task


@dataclass
class Args:
    k: int = 4
    """samples that the objective takes the best of"""
    n: int | None = None
    """samples per prompt, at least k; more than k lowers the variance, by averaging over all k-subsets (default: k or
    16, whichever is more; the papers' setting is n = k)"""
    estimator: Literal["mean", "unbiased", "biased"] = "unbiased"
    """mean reward (RLOO, the baseline); pass@k; pass@k centred, which is the gradient of pass@(k-1)"""
    model: str = "tiny"
    """"tiny" (embedded, about 1M parameters), or a Hugging Face causal LM: hub id or folder"""
    task: str = "arithmetic"
    """which problems and verifier, see verifiers/"""
    data: str | None = None
    """a local file or folder with the task's problems, instead of its default source"""
    sandbox: str = "auto"
    """for tasks that run programs: auto, bubblewrap, landlock or rlimits, see verifiers/sandbox.py"""
    levels: tuple[int, ...] = ()
    """difficulty levels to train on (default: all)"""
    steps: int = 300
    """optimisation steps; 0 only evaluates"""
    prompts_per_step: int = 64
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
    eval_every: int = 100
    """steps between evaluations on held-out problems; 0: only before and after"""
    eval_n: int = 32
    """samples per problem in evaluation; pass@1 to pass@eval_n are reported"""
    eval_problems: int = 100
    """held-out problems per level"""
    run_name: str | None = None
    """folder under runs/ (default: made from the arguments)"""


# --- copy this -------------------------------------------------------------------------------------------------------


def advantages(rewards: torch.Tensor, k: int, estimator: str = "unbiased") -> torch.Tensor:
    """Advantages A of the pass@k policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over the n samples.

    rewards: (B, n), n >= k, any real numbers. Returns (B, n), of the same dtype (float32 for integers and bools).
      mean      A_i = (1/n) (r_i - mean_{j != i} r_j)                                                        (RLOO)
      unbiased  A_i = (k/n) mean over k-subsets T containing i of [ max T - max (T without i) ]         (n = k: Tang)
      biased    the same less the subset's mean advantage (Tang); its expectation is the gradient of pass@(k-1)
    With k = 1 pass@k is the mean reward: unbiased is mean, and biased is zero. With n = 1, mean has no baseline.
    Raises ValueError unless 1 <= k <= n, for rewards that are not finite, and for an unknown estimator.

    With rewards sorted upwards, d_l = r_(l+1) - r_(l), and p_l = C(l, k-1) / C(n-1, k-1), the share of the subsets with
    a given member whose others all lie among the l lowest (PKPO, arXiv 2505.15201, "loo-1"):

      unbiased  A_(i) = (k/n) sum_{l < i} d_l p_l
      biased    A_(i) = ((k-1)/n) [ sum_{l < i} d_l p_l - sum_{l >= i} d_l p_l (n-l)/l ]
    """
    n, rewards = rewards.shape[-1], rewards if rewards.is_floating_point() else rewards.float()
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite: see (prompt, sample) {(~rewards.isfinite()).nonzero()[0].tolist()}")
    if estimator == "mean" or (estimator == "unbiased" and k == 1):
        if n == 1:
            return rewards.clone()
        rewards = rewards - rewards[..., :1]  # changes nothing, but makes equal rewards exact zeros, which cost nothing
        return (rewards - rewards.mean(-1, keepdim=True)) / (n - 1)
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"unknown estimator {estimator!r}: choose mean, unbiased or biased")
    r, order = rewards.double().sort(dim=-1)
    l = torch.arange(1, n, dtype=torch.float64, device=rewards.device)  # 1 .. n-1
    # p_l in product form: p_{n-1} = 1 and p_{l-1} = p_l (l-k+1)/l; it neither overflows nor cancels
    p = torch.cat([((l[1:] - k + 1) / l[1:]).clamp(min=0).flip(0).cumprod(0).flip(0), torch.ones_like(l[:1])])
    gap = r.diff(dim=-1) * p  # (B, n-1)
    lower = torch.nn.functional.pad(gap.cumsum(-1), (1, 0))  # (B, n): sum over l < i
    if estimator == "unbiased":
        A = k / n * lower
    else:
        gap = gap * (n - l) / l
        higher = torch.nn.functional.pad(gap.flip(-1).cumsum(-1).flip(-1), (0, 1))  # (B, n): sum over l >= i
        A = (k - 1) / n * (lower - higher)
    return torch.empty_like(A).scatter_(-1, order, A).to(rewards.dtype)


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
        A = advantages(verdict.rewards, args.k, args.estimator)  # (B, n)
        ratios = common.log_ratios(policy, reference, rollouts if args.kl_coef else rollouts.first(), args)
        if args.kl_coef:
            A = A + args.kl_coef * common.kl_advantages(ratios)
        stats = common.policy_gradient_step(policy, optimizer, rollouts, A, args)
        record = {
            "step": step,
            **common.rollout_metrics(policy, rollouts, verdict, A),
            f"pass@{args.k}": common.pass_at_k(verdict.rewards, args.k).mean().item(),
            "kl": common.kl_estimate(ratios),
            **stats,
            **verdict.counts,
        }
        timings = common.step_timings(policy, rollouts, verdict, start)
        run.log(record, timings, ["reward", f"pass@{args.k}", "kl", "signal", *verdict.counts, "tokens_per_s"])
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.progress["after"] = evaluate(step)

    before, after = run.progress["before"], run.progress.get("after")
    if args.steps:
        common.save_policy(policy, run.folder / "policy")
    columns = [f"pass@{j}" for j in sorted({1, args.k, args.eval_n})]
    print(common.comparison_table(before, after, test_problems, columns))
    common.save_figure(run.folder, run.progress["history"], run.progress["rewards"], ["pass"], args.k)
    print(f"{run.folder}: metrics.jsonl, curves.png{', policy/' if args.steps else ''}")


if __name__ == "__main__":
    common.run_cli(main, Args)
