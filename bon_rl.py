"""Best-of-N aware RL: the response of N that a verifier picks is right. See docs/best_of_n_rl.md.

Chow, Tennenholtz, Gur, Zhuang, Dai, Kumar, Agarwal, Thiagarajan, Boutilier, Faust. Inference-Aware Fine-Tuning for
Best-of-N Sampling in Large Language Models. ICLR 2025, arXiv 2412.15287. The objective, with pi_bon the policy that
draws N responses from pi and keeps the one that a verifier scores highest, and R the environment's reward,

    J = E_x E_{y ~ pi_bon(.|x)} [ R(x, y) ]

and its gradient estimates, sum_i A_i grad log pi(y_i), see `advantages`. The verifier is the environment's reward
(BoN-RL-S; J is then pass@N) or a learned reward model, which selects in training and at test time (BoN-RL-V).

Unlike pass_at_k_pg.py: the advantages depend on a verifier's scores as well as rewards; a value network can be the
baseline; the KL is to a moving average of the policy, and its coefficient can fall; the learning rate can warm up.

    python bon_rl.py --N 8                                           # exact gradient, the environment selects
    python bon_rl.py --N 8 --estimator variational                   # BoN-RL as in the paper
    python bon_rl.py --N 16 --estimator rlb-p                        # BoN-RLB(P)
    python bon_rl.py --N 8 --verifier learned                        # BoN-RL-V
    python bon_rl.py --N 8 --estimator mean                          # the baseline, N = 1
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch

import common
from common import best_of_k, best_of_n_tilt, checked_rewards, k_sample_advantages, mean_advantages, ranks, win_shares
from harness.parallel import average_gradients
from harness.run import Run, RunArgs, rollout_metrics, run_cli, sizes_up_to
from verifiers import BadInput, with_checked_verdicts

# Table 2 of the paper (Gemma 2 2B), for --preset paper
PAPER = {
    "lr": 3e-6, "warm_up_steps": 100, "lr_decay": False, "value_lr": 1e-5, "anchor_rate": 0.01, "steps": 2500,
    "prompts_per_step": 32, "temperature": 1.0, "kl_coef": 1.0, "kl_coef_end": 0.075, "kl_delay": 10,
    "kl_anneal_steps": 2500, "estimator": "variational", "baseline": "value",
}  # fmt: skip


@dataclass
class Args(RunArgs):
    preset: Literal["small", "paper"] = "small"  # defaults: small are ours, paper is Table 2; your own flags win
    N: int = 8  # samples that the verifier chooses from
    n: int | None = None  # samples per prompt; `variational` takes 3 N or more, 2 N with a value network (default: 3 N)
    estimator: Literal["mean", "exact", "variational", "rlb", "rlb-p", "rlb-all"] = "exact"
    """mean: the mean reward (RLOO, the baseline). exact: Best-of-N by leave-one-out. variational: the paper's BoN-RL.
    For a verifier that is the 0/1 reward: rlb (BoN-RLB), rlb-p (BoN-RLB(P)), rlb-all (rlb-p from all samples)"""
    verifier: Literal["environment", "learned"] = "environment"  # what selects: the reward, or a reward model
    verifier_model: str | None = None  # that reward model, a hub id or folder (default: trained here on own samples)
    verifier_problems: int = 8000  # training problems, with 8 samples each, to train it on
    verifier_lr: float = 1e-3  # its learning rate; 1e-5 suits pretrained models
    baseline: Literal["loo", "value"] = "loo"  # of mean and variational: the other samples, or a value network
    value_lr: float = 1e-4  # learning rate of the value network's AdamW
    warm_up_steps: int = 0  # steps over which the learning rate rises linearly to lr
    kl_coef: float = 0.0  # beta of -beta KL(policy || anchor) in the objective; the anchor is a moving average
    kl_coef_end: float | None = None  # beta moves linearly to this value (default: it stays)
    kl_delay: int = 10  # steps before beta starts to move
    kl_anneal_steps: int | None = None  # steps over which beta moves (default: all)
    log_kl: bool = False  # log this KL when beta is 0; it takes a copy of the policy and a forward pass
    anchor_rate: float = 0.01  # weight of the policy in each step of the average; 0: the anchor never moves
    epochs: int = 1  # optimiser steps on the same rollouts; PPO clipping applies from 2 on
    clip: float = 0.2  # epsilon of PPO clipping


# --- copy this, with checked_rewards, mean_advantages, k_sample_advantages, subset_weights, ranks, win_shares,
# best_of_k and best_of_n_tilt of common.py ---------------------------------------------------------------------------


def advantages(
    rewards: torch.Tensor, scores: torch.Tensor, N: int, estimator: str = "exact",
    baseline: torch.Tensor | None = None, p_fail: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Advantages A of the Best-of-N policy gradient, to be used as sum_i A_i grad log pi(y_i): a sum over n samples.

      mean         A_i = (1/n) (r_i - b),  b the mean of the others                                            (RLOO)
      exact        A_i = (N/n) mean over N-subsets T containing i of [ f(T) - f(T without i) ]         (Tang, Lemma 1)
      variational  E_{y ~ pi_bon}[ h(y) (R(y) - b) ], see `variational_advantages`                     (Chow, BoN-RL)
      rlb          A_i = w_i (r_i g+ + (1-r_i) g-),  g+ = N p^(N-1) / (1 - p^N),  g- = N p / (1-p)       (Chow, BoN-RLB)
      rlb-p        A_i = w_i r_i N p^(N-1) (1-p) / (1 - p^N)                                          (Chow, BoN-RLB(P))
      rlb-all      A_i = N p^(N-1) (r_i - (1-p)) / n                                   the same mean, from all samples

    f is the reward of the highest-scored sample, p the failure rate, w_i the chance that y_i wins among N of the n. A
    sum with these weights estimates E_{y ~ pi_bon}. g- adds N p^N/(1-p) grad p, g+ subtracts N p^(N-1)/(1-p) grad p:
    together they are grad (1 - p^N) = -N p^(N-1) grad p.
    rewards: (B, n), the environment's, n >= N, any real numbers. scores: (B, n), the verifier's; equal scores share the
    win. rlb* need rewards 0 and 1, and scores in the same order. baseline: (B,), b of mean and variational, independent
    of these samples. p_fail: (B,), p if known (default: the share of failures among the n samples, clipped to [0.01,
    0.99]). Returns (B, n), of the dtype of rewards (float32 for integers and bools). Raises ValueError unless 1 <= N <=
    n, for rewards or scores that are not finite, and if an estimator lacks what it needs."""
    rewards, scores = checked_rewards(rewards, N), checked_rewards(scores, N, "scores")
    if baseline is not None and estimator not in ("mean", "variational"):
        raise ValueError(f"estimator {estimator!r} has no use for a baseline")
    r, n = rewards.double(), rewards.shape[-1]
    if estimator == "mean" or (N == 1 and estimator == "variational"):
        A = mean_advantages(r) if baseline is None else (r - baseline.double().unsqueeze(-1)) / n
    elif estimator == "exact":
        A = k_sample_advantages(best_of_k, scores, r, k=N)
    elif estimator == "variational":
        A = variational_advantages(r, scores, N, baseline)
    elif estimator in ("rlb", "rlb-p", "rlb-all"):
        if not ((r == 0) | (r == 1)).all():
            raise ValueError(f"{estimator} needs rewards that are 0 or 1")
        if not torch.equal(ranks(scores)[0], ranks(r)[0]):
            raise ValueError(f"{estimator} needs scores that order the samples as the rewards do")
        p = (1 - r.mean(-1)).clamp(0.01, 0.99) if p_fail is None else p_fail.double()
        p, won = p.unsqueeze(-1), win_shares(scores, N)  # (B, 1), (B, n)
        if estimator == "rlb":
            A = won * (r * N * p ** (N - 1) / (1 - p**N) + (1 - r) * N * p / (1 - p))
        elif estimator == "rlb-p":
            A = won * r * N * p ** (N - 1) * (1 - p) / (1 - p**N)
        else:
            A = N * p ** (N - 1) * (r - (1 - p)) / n
    else:
        raise ValueError(f"unknown estimator {estimator!r}: see advantages' docstring")
    return A.to(rewards.dtype)


def variational_advantages(r: torch.Tensor, s: torch.Tensor, N: int, baseline: torch.Tensor | None) -> torch.Tensor:
    """A of Chow's BoN-RL:  E_{y ~ pi_bon}[ h(y) (R(y) - b) ],

        h(y) = grad log pi(y) + lambda_N E_{y' ~ pi}[ 1{s(y) >= s(y')} grad log pi(y') ]

    r: rewards (B, n) float64. s: scores (B, n). The samples form n/N groups: y is the winner of a group, y' any sample
    of another one. b is `baseline` (B,), or the mean reward of the winners of the groups that hold neither y nor y'.
    Returns (B, n) float64. Raises ValueError unless n is a multiple of N, 3 N or more (2 N with a baseline).
    Example: N = 2, rewards and scores 1 0 | 0 0 | 0 0. Winners are worth 1, 0, 0 and their baselines are 0, .5, .5: the
    first gets (1 - 0)/3, each of the tied ones (0 - .5)/3 times its chance of a half. The tilt cancels here: the first
    winner adds to the samples that it beats what the others subtract. A = .33 0 | -.08 -.08 | -.08 -.08."""
    n = r.shape[-1]
    G = n // N
    if n % N or G < (3 if baseline is None else 2):
        raise ValueError(f"variational needs groups of N={N}, 3 or more (2 with a baseline), not n={n} samples")
    r, s = r.view(-1, G, N), s.view(-1, G, N)  # (B, n) -> (B, G, N)
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
    gain = (R.unsqueeze(-1) - b_pair) * other / (n - N)  # (B, G, G): per y', n - N of them for each winner
    tilt = best_of_n_tilt(N) * (gain.unsqueeze(-1) * beaten).sum(1)  # (B, G, G, N) -> (B, G, N)
    return ((won * (r - b) + tilt) / G).flatten(1)  # (B, G, N) -> (B, n)


# ---------------------------------------------------------------------------------------------------------------------


def kl_coefficient(step: int, start: float, end: float | None, delay: int, anneal_steps: int) -> float:
    """beta at a step, 1, 2, ...: `start` for `delay` steps, then linearly to `end` over `anneal_steps` (Table 2).

    Without an `end` beta stays `start`."""
    return start if end is None else start + (end - start) * min(max(step - delay, 0) / max(anneal_steps, 1), 1.0)


@torch.no_grad()
def move_towards(anchor: common.Policy, policy: common.Policy, rate: float) -> None:
    """One step of an exponential moving average: anchor <- (1 - rate) anchor + rate policy, in place (Table 2)."""
    for average, parameter in zip(anchor.model.parameters(), policy.model.parameters(), strict=True):
        average.lerp_(parameter, rate)


class ValueNetwork(torch.nn.Module):
    """b(x): a scalar head, zero at first, on the last hidden state of the prompt, in a copy of the policy's base."""

    def __init__(self, policy: common.Policy):
        super().__init__()
        self.base = copy.deepcopy(policy.model.base_model)
        self.head = torch.nn.Linear(policy.model.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def forward(self, prompts: list[list[int]]) -> torch.Tensor:
        """Values (B,) float32 of B prompts of token ids."""
        ids = torch.zeros(len(prompts), 1, dtype=torch.int64, device=self.head.weight.device)  # (B, 1): any token
        with common.autocast(ids.device):
            hidden = common.response_states(self.base, prompts, ids, ids == 0)  # (B, H): at the prompt's last token
        return self.head(hidden.float()).squeeze(-1)

    def fit(
        self, optimizer: torch.optim.Optimizer, policy: common.Policy, prompts: list[list[int]], rewards: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """One step on the squared error to rewards (B,). Returns the values (B,) float32 on the CPU and the mean error
        before it, from one pass in micro-batches of the policy's size. Raises BadInput if one row does not fit."""
        ids, parameters = torch.zeros(len(prompts), 1, 1, dtype=torch.int64), list(self.parameters())
        rollouts, rewards = common.Rollouts(prompts, ids, ids == 0, ids.float()), rewards.to(self.head.weight)

        def gradient() -> torch.Tensor:
            common.zero_gradients(parameters)
            values = torch.zeros_like(rewards)
            every = torch.arange(len(prompts))
            for rows, of_row, different, *_ in common.micro_batches(rollouts, every, policy.micro_batch_tokens):
                part = self(different)[of_row]  # (U,) -> (B',)
                ((part - rewards[rows]).square().sum() / len(prompts)).backward()
                values[rows] = part.detach()
            return values

        values = common.halving(policy, rollouts, gradient)  # (B,)
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return values.cpu(), (values - rewards).square().mean().item()


def check_args(args: Args) -> None:
    """Raise BadInput for arguments that do not go together, or out of range where only this script has them."""
    groups = 2 if args.baseline == "value" else 3
    if args.estimator == "variational" and 1 < args.N <= args.n and (args.n % args.N or args.n < groups * args.N):
        raise BadInput(f"--estimator variational needs --n {groups * args.N} or a larger multiple of --N, not {args.n}")
    if args.baseline == "value" and args.estimator not in ("mean", "variational"):
        raise BadInput(f"--baseline value is for --estimator mean and variational: {args.estimator} has no use for it")
    if args.estimator.startswith("rlb") and args.verifier == "learned":
        raise BadInput(f"--estimator {args.estimator} is a closed form for --verifier environment")
    if not 0 <= args.anchor_rate <= 1:
        raise BadInput(f"--anchor-rate must lie between 0 and 1, not {args.anchor_rate}")


def main(args: Args) -> None:
    args.n = 3 * args.N if args.n is None else args.n
    check_args(args)
    run = Run(args, args.task, args.model, args.estimator, args.verifier, f"N{args.N}", f"n{args.n}", f"s{args.seed}")
    if args.estimator.startswith("rlb"):
        if run.own_scores:
            raise BadInput(f"--estimator {args.estimator} is a closed form for scores that are the rewards: use exact")
        run.task = with_checked_verdicts(run.task, f"--estimator {args.estimator}")
    policy, ks = run.policy, sizes_up_to(args.eval_n, args.N)
    anneal_steps = args.steps if args.kl_anneal_steps is None else args.kl_anneal_steps
    # Best-of-N by scores that are the rewards is pass@N.
    selected = "bon" if args.verifier == "learned" or run.own_scores else "pass"
    if args.verifier == "learned":
        run.use_learned_verifier()
    anchor = run.reference("anchor") if args.kl_coef or args.kl_coef_end or args.log_kl else None
    value = ValueNetwork(policy) if args.baseline == "value" else None
    if value:
        value_optimizer = torch.optim.AdamW(value.parameters(), lr=args.value_lr, weight_decay=0.0, fused=True)
        run.state |= {"value": value, "value_optimizer": value_optimizer}

    def metrics(verdict):
        passes = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        return passes | {f"{selected}@{j}": common.best_of_k(verdict.scores, verdict.rewards, j) for j in ks}

    for step in run.steps(metrics, f"{args.estimator} N={args.N}"):
        problems, prompts, generator = run.batch(step)
        rollouts = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
        verdict = run.verdict(problems, common.decode(policy, rollouts))
        best = common.best_of_k(verdict.scores, verdict.rewards, args.N)  # (B,): reward of the winner among N
        record, b = {f"{selected}@{args.N}": best.mean().item()}, None
        if value:
            target = best if args.estimator == "variational" else verdict.rewards.mean(-1)  # (B,)
            b, record["value_loss"] = value.fit(value_optimizer, policy, prompts, target)  # (B,)
        A = advantages(verdict.rewards, verdict.scores, args.N, args.estimator, b)  # (B, n)
        record |= rollout_metrics(policy, rollouts, verdict, A)
        if anchor:
            ratios = common.log_ratios(policy, anchor, rollouts)  # (B, n, T)
            record["kl"] = common.kl_estimate(ratios)
            beta = kl_coefficient(step, args.kl_coef, args.kl_coef_end, args.kl_delay, anneal_steps)
            A = A + beta * common.kl_advantages(ratios) if beta else A
        record |= common.policy_gradient_step(
            policy, run.optimizer, rollouts, A, args.max_grad_norm, args.epochs, args.clip, average_gradients
        )
        if anchor:
            move_towards(anchor, policy, args.anchor_rate)
        run.log(step, rollouts, verdict, record, ("reward", f"{selected}@{args.N}", "kl", "tokens_per_s"))
    columns = [f"{selected}@{j}" for j in sorted({1, args.N, args.eval_n})]
    columns += [f"pass@{args.N}"] if selected == "bon" else []
    run.finish(columns, args.N)


if __name__ == "__main__":
    run_cli(main, Args, {"paper": PAPER})
