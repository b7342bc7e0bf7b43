"""Best-of-N aware RL: train a language model so that the best of N responses, by a verifier's choice, is right.

Chow, Tennenholtz, Gur, Zhuang, Dai, Kumar, Agarwal, Thiagarajan, Boutilier, Faust. Inference-Aware Fine-Tuning for
Best-of-N Sampling in Large Language Models. ICLR 2025, arXiv 2412.15287. The objective, with pi_bon the policy that
draws N responses from pi and keeps the one that a verifier scores highest, and R the environment's reward,

    J = E_x E_{y ~ pi_bon(.|x)} [ R(x, y) ]

and its gradient estimates, sum_i A_i grad log pi(y_i), see `advantages`. The verifier is the environment's reward
(BoN-RL-S; J is then pass@N) or a learned one, which selects in training as at test time (BoN-RL-V).

What differs from pass_at_k_pg.py: the advantages below, which read a verifier's scores as well as rewards; a value
network as a baseline; the KL, which is to a moving average of the policy, with a coefficient that falls; warm-up;
evaluation at several temperatures.

    python bon_rl.py --N 8                                           # exact gradient, the environment selects
    python bon_rl.py --N 8 --estimator variational                   # BoN-RL as in the paper
    python bon_rl.py --N 16 --estimator rlb-positive                 # BoN-RLB(P)
    python bon_rl.py --N 8 --verifier learned                        # BoN-RL-V
    python bon_rl.py --N 8 --estimator mean                          # the baseline, N = 1
"""

import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import common
from verifiers import BadInput, learned, load_task

# Table 2 of the paper (Gemma 2 2B), for --preset paper
PAPER = {
    "lr": 3e-6, "warm_up_steps": 100, "value_lr": 1e-5, "anchor_rate": 0.01, "steps": 2500, "prompts_per_step": 32,
    "temperature": 1.0, "kl_coef": 1.0, "kl_coef_end": 0.075, "kl_delay": 10, "kl_anneal_steps": 2500,
    "estimator": "variational", "baseline": "value",
}  # fmt: skip


@dataclass
class Args:
    preset: Literal["small", "paper"] = "small"
    """defaults: ours for small models, or those of the paper's Table 2; flags given beside it win"""
    N: int = 8
    """samples that the verifier chooses from"""
    n: int | None = None
    """samples per prompt, at least N; `variational` takes groups of N, 3 at least (2 with --baseline value); the others
    average over all N-subsets (default: 3 N)"""
    estimator: Literal["mean", "exact", "variational", "rlb", "rlb-positive", "rlb-all"] = "exact"
    """mean reward (RLOO, the baseline); Best-of-N by leave-one-out; the paper's BoN-RL; its closed forms for a verifier
    that is the 0/1 reward: BoN-RLB, BoN-RLB(P), and the same gradient by all samples"""
    verifier: Literal["environment", "learned"] = "environment"
    """what selects: the reward itself (BoN-RL-S) or a reward model (BoN-RL-V)"""
    verifier_model: str | None = None
    """reward model for --verifier learned: hub id or folder (default: trained here on the policy's own samples)"""
    verifier_problems: int = 8000
    """training problems to sample 8 responses to each, for training it"""
    verifier_lr: float = 1e-3
    """learning rate of training it; 1e-5 suits pretrained models"""
    baseline: Literal["loo", "value"] = "loo"
    """b(x) of `mean` and `variational`: the other groups of the prompt, or a value network"""
    value_lr: float = 1e-4
    """learning rate of the value network's AdamW"""
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
    steps: int = 200
    """optimisation steps; 0 only evaluates"""
    prompts_per_step: int = 32
    """prompts in a step; it samples n times as many responses"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    warm_up_steps: int = 0
    """steps over which the learning rate rises linearly to lr"""
    temperature: float = 1.0
    """sampling temperature, in training (of the differentiated log-probs, too) and in evaluation"""
    max_new_tokens: int | None = None
    """longest response in tokens (default: the task's)"""
    kl_coef: float = 0.0
    """beta of -beta KL(policy || anchor), added to the objective; the anchor is a moving average of the policy"""
    kl_coef_end: float = 0.0
    """what beta falls to, linearly"""
    kl_delay: int = 10
    """steps before beta starts to fall"""
    kl_anneal_steps: int | None = None
    """steps over which it falls (default: all)"""
    anchor_rate: float = 0.01
    """share of the policy in each step of the moving average; 0: the anchor stays the initial policy"""
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
    """samples per problem in evaluation; pass@1 to pass@eval_n are reported, and bon@1 to bon@eval_n"""
    eval_problems: int = 100
    """held-out problems per level"""
    eval_temperatures: tuple[float, ...] = (0.7, 1.3)
    """further temperatures at which the policy is evaluated before and after"""
    run_name: str | None = None
    """folder under runs/ (default: made from the arguments)"""


# --- copy this, with common.win_shares, best_of_k_without and best_of_n_tilt -----------------------------------------


def advantages(
    rewards: torch.Tensor,
    scores: torch.Tensor,
    N: int,
    estimator: str = "exact",
    baseline: torch.Tensor | None = None,
    p_fail: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages A of the Best-of-N policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over n samples.

    rewards: (B, n), of the environment, n >= N, any real numbers. scores: (B, n), the verifier's; equal scores share.
    Returns (B, n), of the dtype of `rewards` (float32 for integers and bools).
      mean          A_i = (1/n) (r_i - b),  b the mean of the others                                            (RLOO)
      exact         Tang's Lemma 1 for f = reward of the best-scored, averaged over all N-subsets T containing i:
                    A_i = (N/n) mean of [ f(T) - f(T without i) ]; unbiased for grad J
      variational   E_{y ~ pi_bon}[ h(y) (R(y) - b) ],  h(y) = grad log pi(y) + lambda_N E_{y' ~ pi}[ 1{s(y) >= s(y')}
                    grad log pi(y') ]: the mean over the n / N groups of N, y being a group's winner, y' all samples of
                    the other groups, b the mean reward of the winners of the groups that hold neither y nor y'
      rlb           E_{y ~ pi_bon}[ (R g+ + (1-R) g-) grad log pi(y) ], y the winner of each N-subset,
                    g+ = N p^(N-1) / (1 - p^N),  g- = N p / (1-p),  p the failure rate of the prompt
      rlb-positive  E_{y ~ pi_bon}[ R N p^(N-1) (1-p) / (1 - p^N) grad log pi(y) ]
      rlb-all       N p^(N-1) E_{y ~ pi}[ (R - (1-p)) grad log pi(y) ]: the same gradient with less variance
    The last three need rewards 0 and 1, of which the scores are an increasing function; there they and `exact` have the
    same expectation if p is exact. With N = 1, exact and variational are mean.

    baseline: (B,), b(x) of mean and variational that does not depend on these samples, in place of the others' mean.
    p_fail: (B,), p in (0, 1), if known; else the share of failures among the n samples, clipped to [0.01, 0.99].
    Raises ValueError unless 1 <= N <= n, for rewards or scores that are not finite, and for what an estimator lacks.
    """
    n, dtype = rewards.shape[-1], rewards.dtype if rewards.is_floating_point() else torch.float32
    if not 1 <= N <= n:
        raise ValueError(f"N must lie in 1..n, not N={N} with n={n} samples")
    for name, values in (("rewards", rewards), ("scores", scores)):
        if not values.isfinite().all():
            where = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} must be finite: see (prompt, sample) {where}")
    if baseline is not None and estimator not in ("mean", "variational"):
        raise ValueError(f"estimator {estimator!r} has no use for a baseline")
    r = rewards.double()
    if estimator == "mean" or (N == 1 and estimator in ("exact", "variational")):
        if baseline is not None:
            A = (r - baseline.double().unsqueeze(-1)) / n
        else:
            r = r - r[:, :1] if n > 1 else r  # changes nothing, but makes equal rewards exact zeros, which cost nothing
            A = (r - r.mean(-1, keepdim=True)) / (n - 1) if n > 1 else r
    elif estimator == "exact":  # from the metric M_N of all samples and that without i, see README
        A = common.best_of_k(scores, r, N).unsqueeze(-1) - N / n * common.best_of_k_without(scores, r, N - 1)
        if N < n:
            A = A - (1 - N / n) * common.best_of_k_without(scores, r, N)
        # What rounding leaves of an exact zero (1e-15) is made zero, so that its row costs nothing.
        A = A.masked_fill(A.abs() < 1e-12 * r.abs().amax(-1, keepdim=True).clamp(min=1e-300), 0)
    elif estimator == "variational":
        G = n // N
        if n % N or G < (3 if baseline is None else 2):
            raise ValueError(f"variational needs groups of N={N}, 3 or more (2 with a baseline), not n={n} samples")
        r, s = r.view(-1, G, N), scores.view(-1, G, N)
        best = s.amax(-1)  # (B, G)
        won = (s == best.unsqueeze(-1)).double()  # (B, G, N)
        won = won / won.sum(-1, keepdim=True)
        R = (won * r).sum(-1)  # (B, G): rewards of the winners
        if baseline is None:
            b = ((R.sum(-1, keepdim=True) - R) / (G - 1)).unsqueeze(-1)  # (B, G, 1): without g
            b_pair = (R.sum(-1).view(-1, 1, 1) - R.unsqueeze(-1) - R.unsqueeze(-2)) / (G - 2)  # (B, G, G): nor g'
        else:
            b = b_pair = baseline.double().view(-1, 1, 1)
        beaten = (best.view(-1, G, 1, 1) >= s.unsqueeze(1)).double()  # (B, G, G, N): winner g, sample j of g'
        other = ~torch.eye(G, dtype=torch.bool, device=r.device)
        gain = (R.unsqueeze(-1) - b_pair) * other / (n - N)  # (B, G, G): per sample y', of which a winner has n - N
        tilt = common.best_of_n_tilt(N) * (gain.unsqueeze(-1) * beaten).sum(1)  # (B, G, G, N) -> (B, G, N)
        A = ((won * (r - b) + tilt) / G).flatten(1)  # (B, G, N) -> (B, n)
    elif estimator in ("rlb", "rlb-positive", "rlb-all"):
        if not ((r == 0) | (r == 1)).all():
            raise ValueError(f"{estimator} needs rewards that are 0 or 1")
        if not torch.equal(common.ranks(scores)[0], common.ranks(r)[0]):
            raise ValueError(f"{estimator} needs scores that order the samples as the rewards do")
        p = (1 - r.mean(-1)).clamp(0.01, 0.99) if p_fail is None else p_fail.double()
        p, won = p.unsqueeze(-1), common.win_shares(scores, N)  # (B, 1), (B, n)
        if estimator == "rlb":
            A = won * (r * N * p ** (N - 1) / (1 - p**N) + (1 - r) * N * p / (1 - p))
        elif estimator == "rlb-positive":
            A = won * r * N * p ** (N - 1) * (1 - p) / (1 - p**N)
        else:
            A = N * p ** (N - 1) * (r - (1 - p)) / n
    else:
        raise ValueError(f"unknown estimator {estimator!r}: see advantages' docstring")
    return A.to(dtype)


def kl_coefficient(step: int, start: float, end: float, delay: int, anneal_steps: int) -> float:
    """beta at a step, 1, 2, ...: `start` for `delay` steps, then linearly to `end` over `anneal_steps` (Table 2)."""
    return start + (end - start) * min(max(step - delay, 0) / max(anneal_steps, 1), 1.0)


def warmed_up(step: int, lr: float, warm_up_steps: int) -> float:
    """The learning rate at a step, 1, 2, ...: rising linearly, `lr` from step `warm_up_steps` on (Table 2)."""
    return lr * min(step / max(warm_up_steps, 1), 1.0)


class ValueNetwork(torch.nn.Module):
    """b(x): a scalar head, zero at first, on the last token of the prompt in a copy of the policy's base model."""

    def __init__(self, policy: common.Policy):
        super().__init__()
        self.base = copy.deepcopy(policy.model.base_model)
        self.head = torch.nn.Linear(policy.model.config.hidden_size, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def forward(self, prompts: list[list[int]]) -> torch.Tensor:
        """Values (B,) float32 of B prompts of token ids."""
        ids, mask = common.padded(prompts)  # (B, P), filler on the right, where causal attention never looks
        device = self.head.weight.device
        with common.autocast(device):
            hidden = self.base(input_ids=ids.to(device), use_cache=False).last_hidden_state  # (B, P, H)
        last = hidden[torch.arange(len(prompts)), mask.sum(-1).to(device) - 1]  # (B, H)
        return self.head(last.float()).squeeze(-1)

    def fit(self, optimizer: torch.optim.Optimizer, prompts: list[list[int]], rewards: torch.Tensor) -> float:
        """One step towards the rewards (B,) of Best-of-N, by squared error; returns its mean before the step."""
        loss = (self(prompts) - rewards.to(self.head.weight)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        common.average_gradients(self.parameters())
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()
        return loss.item()


def win_and_loss_table(before: torch.Tensor, after: torch.Tensor) -> str:
    """Chow's win/lose table: chances, averaged over problems, that independent tries before and after are right.

    before, after: (P,) chances of a right Best-of-N answer to each problem.
    """
    won, lost = ((1 - before) * after).mean(), (before * (1 - after)).mean()
    both, neither = (before * after).mean(), ((1 - before) * (1 - after)).mean()
    return (
        f"            after: right  wrong\nbefore: right  {both:9.3f}  {lost:.3f} (lost)\n"
        f"        wrong  {won:9.3f}  {neither:.3f}   (won at the left)"
    )


# ---------------------------------------------------------------------------------------------------------------------


def check_args(args: Args) -> None:
    """Raise BadInput for arguments out of range or that do not go together."""
    common.check_args(args)
    groups = 2 if args.baseline == "value" else 3
    if args.estimator == "variational" and args.N > 1 and (args.n % args.N or args.n < groups * args.N):
        raise BadInput(f"--estimator variational needs --n {groups * args.N} or a larger multiple of --N, not {args.n}")
    if args.baseline == "value" and args.estimator not in ("mean", "variational"):
        raise BadInput(f"--baseline value is for --estimator mean and variational: {args.estimator} has no use for it")
    if args.baseline == "value" and args.fsdp:
        raise BadInput("--baseline value keeps the value network whole in every process: leave --fsdp out")
    if args.estimator.startswith("rlb") and args.verifier == "learned":
        raise BadInput(f"--estimator {args.estimator} is a closed form for --verifier environment")
    if not 0 <= args.anchor_rate <= 1:
        raise BadInput(f"--anchor-rate must lie between 0 and 1, not {args.anchor_rate}")
    if not all(0 < temperature < float("inf") for temperature in args.eval_temperatures):
        raise BadInput(f"--eval-temperatures must be positive numbers, not {args.eval_temperatures}")


def main(args: Args) -> None:
    args.n = 3 * args.N if args.n is None else args.n
    args.kl_anneal_steps = args.steps if args.kl_anneal_steps is None else args.kl_anneal_steps
    check_args(args)
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
    reference = copy.deepcopy(policy)  # the anchor, for the KL
    if args.fsdp:
        common.shard(args.device, policy, reference)
    verifier = None
    if args.verifier == "learned":
        verifier = common.load_learned_verifier(task, policy, test_problems, args)
        task = learned.with_scores(task, verifier)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    value = ValueNetwork(policy) if args.baseline == "value" else None
    value_optimizer = value and torch.optim.AdamW(value.parameters(), lr=args.value_lr, weight_decay=0.0, fused=True)
    state = {"policy": policy.model, "optimizer": optimizer, "anchor": reference.model}
    state |= {"value": value, "value_optimizer": value_optimizer} if value else {}
    parts = [args.task, args.model, args.estimator, args.verifier, f"N{args.N}", f"n{args.n}", f"s{args.seed}"]
    run = common.Run(args, parts, **state)
    if verifier and not args.verifier_model and common.world()[0] == 0:
        verifier.save(run.folder / "verifier")

    ks = common.powers_of_two(args.eval_n, args.N)
    selected = "bon" if args.verifier == "learned" else "pass"  # the environment's own Best-of-N is pass@N
    temperatures = sorted({args.temperature, *args.eval_temperatures})

    def evaluate(step: int, temperature: float = args.temperature) -> dict[str, torch.Tensor]:
        verdict = common.evaluate(policy, task, test_problems, args, temperature)
        if args.estimator.startswith("rlb") and set(verdict.rewards.unique().tolist()) - {0, 1}:
            raise BadInput(
                f"--estimator {args.estimator} is for rewards 0 and 1, task {args.task!r} has others: use exact"
            )
        metrics = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        if args.verifier == "learned":
            metrics |= {f"bon@{j}": common.best_of_k(verdict.scores, verdict.rewards, j) for j in ks}
        result = common.by_level(metrics, test_problems)
        if temperature == args.temperature:
            run.progress["history"].append((step, result))
            run.log({"step": step, "eval": result, **verdict.counts})
        else:
            run.log({"step": step, "eval_at": temperature, "result": result, **verdict.counts})
        if verdict.counts:
            tqdm.write(f"evaluation at step {step}, events in the verifier: {verdict.counts}")
        return metrics

    if "before" not in run.progress:
        run.progress["before"] = evaluate(0)
        run.progress["others_before"] = {T: evaluate(0, T) for T in temperatures if T != args.temperature}
    for step in run.steps(f"{args.estimator} N={args.N}"):
        start = time.perf_counter()
        problems = common.share(common.training_batch(train_problems, step - 1, args.prompts_per_step, args.seed))
        prompts = common.encode_prompts(policy, task, problems, args.max_new_tokens)
        generator = common.step_generator(policy.device, args.seed, step)
        rollouts = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
        verdict = common.judged(task, problems, common.decode(policy, rollouts))
        best = common.best_of_k(verdict.scores, verdict.rewards, args.N)  # (B,): reward of the winner among N
        b = value(prompts).detach().cpu() if value else None  # (B,)
        A = advantages(verdict.rewards, verdict.scores, args.N, args.estimator, b)  # (B, n)
        ratios = common.log_ratios(policy, reference, rollouts if args.kl_coef else rollouts.first(), args)
        if args.kl_coef:
            beta = kl_coefficient(step, args.kl_coef, args.kl_coef_end, args.kl_delay, args.kl_anneal_steps)
            A = A + beta * common.kl_advantages(ratios)
        optimizer.param_groups[0]["lr"] = warmed_up(step, args.lr, args.warm_up_steps)
        stats = common.policy_gradient_step(policy, optimizer, rollouts, A, args)
        common.move_towards(reference, policy, args.anchor_rate)
        if value:
            stats["value_loss"] = value.fit(value_optimizer, prompts, best if args.estimator == "variational" else
                                            verdict.rewards.mean(-1))  # fmt: skip
        record = {
            "step": step,
            **common.rollout_metrics(policy, rollouts, verdict, A),
            f"{selected}@{args.N}": best.mean().item(),
            "kl": common.kl_estimate(ratios),
            **stats,
            **verdict.counts,
        }
        timings = common.step_timings(policy, rollouts, verdict, start)
        run.log(record, timings, ["reward", f"{selected}@{args.N}", "kl", "signal", *verdict.counts, "tokens_per_s"])
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.progress["after"] = evaluate(step)

    before, after = run.progress["before"], run.progress.get("after")
    if args.steps:
        common.save_policy(policy, run.folder / "policy")
    key = f"{selected}@{args.N}"
    columns = [f"{selected}@{j}" for j in sorted({1, args.N, args.eval_n})]
    columns += [f"pass@{args.N}"] if args.verifier == "learned" else []
    print(common.comparison_table(before, after, test_problems, columns))
    for T, start in run.progress["others_before"].items():
        end = evaluate(args.steps, T) if args.steps else None
        header, overall = common.comparison_table(start, end, test_problems, columns).splitlines()[:2]
        print(f"at temperature {T:g}:\n{header}\n{overall}")
    if args.steps:
        print(f"{key}, one try before and one after:\n{win_and_loss_table(before[key], after[key])}")
    names = ["pass", "bon"] if args.verifier == "learned" else ["pass"]
    common.save_figure(run.folder, run.progress["history"], run.progress["rewards"], names, args.N)
    print(f"{run.folder}: metrics.jsonl, curves.png{', policy/' if args.steps else ''}")


if __name__ == "__main__":
    common.run_cli(main, Args, {"paper": PAPER})
