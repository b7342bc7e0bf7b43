"""Best-of-N aware SFT: the response of N that a verifier picks is the expert's. See docs/best_of_n_sft.md.

Chow, Tennenholtz, Gur, Zhuang, Dai, Kumar, Agarwal, Thiagarajan, Boutilier, Faust. Inference-Aware Fine-Tuning for
Best-of-N Sampling in Large Language Models. ICLR 2025, arXiv 2412.15287. The objective, with pi_bon the policy that
draws N responses from pi and keeps the one that a verifier scores highest, over problems x and expert responses y*,

    J = E_{x, y*} [ log pi_bon(y* | x) ]

Its gradient, sum_i A_i grad log pi(y_i), is a sum over the expert and n samples of the policy, see `coefficients`. With
N = 1 it is plain SFT, to the bit, and training draws no samples.

Unlike bon_rl.py: the sum has an expert's response, and the verifier's score is the only reward.

    python bon_sft.py --N 8                            # variational, as in the paper
    python bon_sft.py --N 8 --likelihood exact         # the exact likelihood of a 0/1 verifier
    python bon_sft.py --N 1 --eval-N 8                 # plain SFT, the baseline
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.functional import pad

import common
from common import best_of_n_tilt, checked_rewards, ranks, subset_weights, win_shares
from harness.parallel import average_gradients
from harness.policy import expert_rollouts
from harness.problems import digest_of
from harness.run import Run, RunArgs, keep_file, run_cli, sizes_up_to
from verifiers import BadInput, Problem, Task, with_checked_verdicts
from verifiers.rows import load_rows, require_columns


@dataclass
class Args(RunArgs):
    N: int = 8  # samples that the verifier chooses from; 1 is plain SFT
    n: int | None = None  # samples per prompt, more than N (default: 2 N; none if N = 1)
    likelihood: Literal["variational", "exact"] = "variational"  # the paper's, or a 0/1 verifier's closed form
    experts: str | None = None
    """JSONL or Parquet: problem, response, optionally answer; m rows of a problem weigh 1/m (default: the task's)"""
    verifier: Literal["environment", "learned"] = "environment"  # what selects: the reward itself or a reward model
    verifier_model: str | None = None  # that reward model, a hub id or folder (default: trained here on own samples)
    verifier_problems: int = 8000  # training problems, with 8 samples each, to train it on
    verifier_lr: float = 1e-3  # its learning rate; 1e-5 suits pretrained models
    eval_N: int | None = None  # the N of the table and the figure (default: --N)


# --- copy this, with checked_rewards, win_shares, ranks, subset_weights and best_of_n_tilt of common.py --------------


def coefficients(
    expert_scores: torch.Tensor, scores: torch.Tensor, N: int, likelihood: str = "variational",
    p_fail: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Coefficients of grad log pi in the gradient of log pi_bon(y*): 1 for the expert y*, A_j for n samples of pi.

      variational  A_j = 1/n - P(j wins T) + (lambda_N / n) (1{s* >= s_j} - P(max_{i in T} s_i >= s_j | j not in T))
      exact        A_j = ((1{s_j = 0} - p) / n) w,  w = 1 / (1-p) - N p^(N-1) / (1 - p^N)  or, s* = 0,  (N-1) / p

    T is a random N-subset of the samples, p the failure rate. expert_scores: (B,), the verifier's scores of y*. scores:
    (B, n), n > N; not used if N = 1. exact needs scores 0 and 1. p_fail: (B,), p if known (default: the share
    of failures among the n samples, clipped to [0.01, 0.99]). Returns (B, 1 + n), of the dtype of `scores` (float32 for
    integers and bools), to be used as a sum. Raises ValueError unless 1 <= N < n (or N = 1), for scores that are not
    finite, and for an unknown likelihood.
    Example, variational: N = 2, a right expert, samples 1, 0, 0. These win 2/3, 1/6, 1/6 of pairs and lambda_2 / n is
    .76. The coefficients are 1; 1/3 - 2/3 + .76 (1 - 0) = .43; twice 1/3 - 1/6 + .76 (1 - 1) = .17."""
    (B, n), dtype = scores.shape, scores.dtype if scores.is_floating_point() else torch.float32
    if likelihood not in ("variational", "exact"):
        raise ValueError(f"unknown likelihood {likelihood!r}: choose variational or exact")
    if N < 1 or (N > 1 and n <= N):
        raise ValueError(f"N must be at least 1 and less than n, not N={N} with n={n} samples")
    every = torch.cat([expert_scores.unsqueeze(-1), scores], -1)  # (B, 1 + n)
    checked_rewards(every, 1, "scores, with the expert's as sample 0,")
    if N == 1:
        A = torch.zeros_like(scores)
    elif likelihood == "variational":
        # h(y*) - E_{y ~ pi_bon}[h(y)],  h(y) = grad log pi(y) + lambda_N E_{y' ~ pi}[1{s(y) >= s(y')} grad log pi(y')]
        inside = torch.nn.functional.pad(subset_weights(n - 1, N).cumsum(0), (1, 0))  # (n,): C(j, N) / C(n-1, N)
        below = inside.to(scores.device)[ranks(scores)[0]]  # (B, n): P(max of T < s_j | j not in T)
        tilt = best_of_n_tilt(N) / n * (below - (expert_scores.unsqueeze(-1) < scores).double())
        A = 1 / n - win_shares(scores, N) + tilt
    else:
        if not ((every == 0) | (every == 1)).all():
            raise ValueError("the exact likelihood needs scores that are 0 or 1")
        # log pi_bon(y*) = log pi(y*) + log((1 - p^N) / (1 - p)) for a right y*, log pi(y*) + (N-1) log p for a wrong
        # one; grad p = E[(1{s = 0} - p) grad log pi]
        fail = 1 - scores.double()
        p = (fail.mean(-1).clamp(0.01, 0.99) if p_fail is None else p_fail.double()).unsqueeze(-1)  # (B, 1)
        right = 1 / (1 - p) - N * p ** (N - 1) / (1 - p**N)
        A = (fail - p) / n * torch.where(expert_scores.unsqueeze(-1) == 1, right, (N - 1) / p)
    return torch.cat([torch.ones(B, 1, dtype=dtype, device=scores.device), A.to(dtype)], -1)


# ---------------------------------------------------------------------------------------------------------------------


def joined(first: common.Rollouts, second: common.Rollouts) -> common.Rollouts:
    """The responses of both to the same prompts: (B, n1, T1) and (B, n2, T2) -> (B, n1 + n2, T), T the longer."""
    T = max(first.ids.shape[-1], second.ids.shape[-1])
    pairs = (first.ids, second.ids), (first.mask, second.mask), (first.log_probs, second.log_probs)
    tensors = (torch.cat([pad(x, (0, T - x.shape[-1])) for x in pair], 1) for pair in pairs)
    return common.Rollouts(second.prompts, *tensors, second.temperature)


def mean_over_experts(coefficients: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Coefficients (E, 1 + n) of E experts and their prompts' samples, averaged over the experts of each of B prompts:
    (B, m + n) float32. counts: (B,) int64, the experts of each prompt, E in all and m at most.

    Example: counts (2, 1), n = 1 and rows (1, .2), (1, .4), (1, .6) give (.5, .5, .3), (1, 0, .6)."""
    B, m = len(counts), int(counts.max())
    own = torch.arange(m) < counts.unsqueeze(-1)  # (B, m)
    experts = torch.zeros(B, m).masked_scatter(own, coefficients[:, 0].float()) / counts.unsqueeze(-1)
    of_prompt = torch.arange(B).repeat_interleave(counts)  # (E,)
    samples = torch.zeros(B, coefficients.shape[1] - 1).index_add(0, of_prompt, coefficients[:, 1:].float())
    return torch.cat([experts, samples / counts.unsqueeze(-1)], -1)


def experts_of(path: str, task: Task, problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Prompt -> a problem for each of its rows in the file, with the response as its solution. Its answer is
    the row's, else the answer of the prompt's first problem that it solves, else of the first. Raises BadInput."""
    rows, of_prompt, result = load_rows("", "train", path, flag="--experts"), {}, {}
    require_columns(rows, ["problem", "response"], path)
    for problem in problems:
        of_prompt.setdefault(problem.prompt, {}).setdefault(problem.answer, problem)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["problem"], str) or row["problem"] not in of_prompt:
            raise BadInput(f"{path}, row {number}: {str(row['problem'])[:40]!r} is no training problem of the task")
        for name in ("response", "answer"):
            if not (isinstance(row.get(name), str) and row[name] or name == "answer" and row.get(name) is None):
                raise BadInput(f"{path}, row {number}: the {name} must be a text, not {str(row[name])[:40]!r}")
    pairs = [(row, problem) for row in rows for problem in of_prompt[row["problem"]].values()]
    verdict = task.verify([problem for _, problem in pairs], [[row["response"]] for row, _ in pairs])
    rewards = iter(verdict.rewards)  # of one row after the other
    for row in rows:
        own = [*of_prompt[row["problem"]].values()]
        solved = [problem for problem, reward in zip(own, rewards) if reward > 0]
        problem = replace((solved or own)[0], solution=row["response"])
        result.setdefault(problem.prompt, []).append(replace(problem, answer=row.get("answer") or problem.answer))
    return result


def main(args: Args) -> None:
    args.n = (1 if args.N == 1 else 2 * args.N) if args.n is None or args.N == 1 else args.n
    args.eval_N = args.N if args.eval_N is None else args.eval_N
    if 1 < args.N == args.n:
        raise BadInput(f"--n must be more than --N {args.N}, not {args.n}: a winner is compared with other samples")
    if args.eval_n >= args.N >= 1 and not 1 <= args.eval_N <= args.eval_n:
        raise BadInput(f"--eval-N must lie between 1 and --eval-n {args.eval_n}, not {args.eval_N}")
    if args.likelihood == "exact" and args.verifier == "learned":
        raise BadInput("--likelihood exact is a closed form for --verifier environment")
    run = Run(args, args.task, args.model, args.likelihood, args.verifier, f"N{args.N}", f"n{args.n}", f"s{args.seed}")
    if args.likelihood == "exact":
        run.task = with_checked_verdicts(run.task, "--likelihood exact")
    task, ks = run.task, sizes_up_to(args.eval_n, args.eval_N)
    # Best-of-N by scores that are the rewards is pass@N.
    selected = "bon" if args.verifier == "learned" or run.own_scores else "pass"
    experts = experts_of(args.experts, task, run.train) if args.experts and args.steps else {}

    if experts:
        keep_file(
            args, f"--experts {args.experts}", digest_of([problem for group in experts.values() for problem in group])
        )

    def groups_of(problems) -> list[list[Problem]]:
        """The experts of each problem's prompt: the file's, or the problem with its own solution."""
        groups = [experts.get(problem.prompt, [problem]) for problem in problems]
        if not all(problem.solution for group in groups for problem in group):
            raise BadInput(f"task {args.task!r} has problems without a solution: give responses by --experts")
        return groups

    run.train = [group[0] for group in experts.values()] or run.train
    at_once = args.steps and isinstance(run.train, list)  # what is missing or too long is found now, not at step 300
    groups_of(run.train if at_once else run.train[: min(args.steps, 1)])  # the first speaks for those made on demand
    policy = run.policy
    if at_once:
        parts = (run.train[i : i + 256] for i in range(0, len(run.train), 256))  # all at once can fill the memory
        rows = (expert_rollouts(policy, task, run.encoded(part), groups_of(part)).mask.sum(-1) for part in parts)
        if longer := sum((x > args.max_new_tokens).sum().item() for x in rows):  # x: (B, m)
            print(f"{longer} expert responses are longer than --max-new-tokens {args.max_new_tokens}")
    if args.verifier == "learned":
        run.use_learned_verifier()

    def metrics(verdict):
        passes = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        return passes | {f"{selected}@{j}": common.best_of_k(verdict.scores, verdict.rewards, j) for j in ks}

    for step in run.steps(metrics, f"{args.likelihood} N={args.N}"):
        problems, prompts, generator = run.batch(step)
        groups, samples, drawn = groups_of(problems), None, [[]] * len(problems)
        rollouts = expert_rollouts(policy, task, prompts, groups, args.temperature)  # (B, m, T)
        written = common.decode(policy, rollouts)
        if args.N > 1:
            samples = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
            rollouts, drawn = joined(rollouts, samples), common.decode(policy, samples)  # (B, m + n, T)
        rows = [(x, [text, *own]) for group, texts, own in zip(groups, written, drawn) for x, text in zip(group, texts)]
        verdict = run.verdict(*zip(*rows))  # E rows, an expert with its prompt's samples: (E, 1 + n)
        C = coefficients(verdict.scores[:, 0], verdict.scores[:, 1:], args.N, args.likelihood)  # (E, 1 + n)
        A = mean_over_experts(C, torch.tensor([len(group) for group in groups]))  # (B, m + n)
        record = {"expert_reward": verdict.rewards[:, 0].mean().item()}
        record |= {"reward": verdict.rewards[:, 1:].mean().item()} if samples else {}
        record |= common.policy_gradient_step(
            policy, run.optimizer, rollouts, A, args.max_grad_norm, average_gradients=average_gradients
        )
        run.log(step, samples, verdict, record, ("expert_reward", "reward", "loss", "tokens_per_s"))
    columns = [f"{selected}@{j}" for j in sorted({1, args.eval_N, args.eval_n})]
    columns += [f"pass@{args.eval_N}"] if selected == "bon" else []
    run.finish(columns, args.eval_N)


if __name__ == "__main__":
    run_cli(main, Args)
