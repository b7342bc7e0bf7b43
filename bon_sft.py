"""Best-of-N aware SFT: imitate experts so that the best of N responses, by a verifier's choice, is like theirs.

Chow, Tennenholtz, Gur, Zhuang, Dai, Kumar, Agarwal, Thiagarajan, Boutilier, Faust. Inference-Aware Fine-Tuning for
Best-of-N Sampling in Large Language Models. ICLR 2025, arXiv 2412.15287. The objective, with pi_bon the policy that
draws N responses from pi and keeps the one that a verifier scores highest, over problems x and expert responses y*,

    J = E_{x, y*} [ log pi_bon(y* | x) ]

whose gradient, sum_i A_i grad log pi(y_i), runs over the expert and over n samples of the policy, see `coefficients`.
With N = 1 it is plain SFT, to the bit, and nothing is sampled.

What differs from bon_rl.py: the coefficients below; the expert stands beside the samples; no reward but the verifier's.

    python bon_sft.py --N 8                            # variational, as in the paper
    python bon_sft.py --N 8 --likelihood exact         # the exact likelihood of a 0/1 verifier
    python bon_sft.py --N 1 --eval-N 8                 # plain SFT, the baseline
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tqdm import tqdm

import common
from verifiers import BadInput, learned, load_task
from verifiers.rows import load_rows, require_columns


@dataclass
class Args:
    N: int = 8
    """samples that the verifier chooses from; 1 is plain SFT"""
    n: int | None = None
    """samples per prompt, more than N; all N-subsets are averaged over (default: 2 N; none for N = 1)"""
    likelihood: Literal["variational", "exact"] = "variational"
    """of Best-of-N: the paper's approximation, or the closed form for a verifier that is the 0/1 reward"""
    experts: str | None = None
    """JSONL or Parquet file with columns problem and response (default: the task's reference solutions)"""
    verifier: Literal["environment", "learned"] = "environment"
    """what selects: the reward itself or a reward model"""
    verifier_model: str | None = None
    """reward model for --verifier learned: hub id or folder (default: trained here on the policy's own samples)"""
    verifier_problems: int = 8000
    """training problems to sample 8 responses to each, for training it"""
    verifier_lr: float = 1e-3
    """learning rate of training it; 1e-5 suits pretrained models"""
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
    """prompts, each with an expert response, in a step; it samples n times as many responses"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    temperature: float = 1.0
    """sampling temperature, in training (of the differentiated log-probs, too) and in evaluation"""
    max_new_tokens: int | None = None
    """longest response in tokens (default: the task's)"""
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
    eval_N: int | None = None
    """the N of the table and the figure (default: --N)"""
    eval_n: int = 32
    """samples per problem in evaluation; pass@1 to pass@eval_n are reported, and bon@1 to bon@eval_n"""
    eval_problems: int = 100
    """held-out problems per level"""
    run_name: str | None = None
    """folder under runs/ (default: made from the arguments)"""


# --- copy this, with common.win_shares, ranks, subset_weights and best_of_n_tilt --------------------------------------


def coefficients(
    expert_scores: torch.Tensor, scores: torch.Tensor, N: int, likelihood: str = "variational",
    p_fail: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Coefficients of grad log pi in the gradient of log pi_bon(y*), to be used as a sum over y* and the n samples.

    expert_scores: (B,), the verifier's, of y*. scores: (B, n), of n samples from pi, n > N (none are read if N = 1).
    Returns (B, 1 + n), of the dtype of `scores` (float32 for integers and bools): the expert's, 1, and the samples'.
      variational  log pi_bon ~ log pi + lambda_N Q - log Z, so that, averaged over all N-subsets T of the samples,
                   h(y*) - E_{y ~ pi_bon}[ h(y) ],  h(y) = grad log pi(y) + lambda_N E_{y' ~ pi}[ 1{s(y) >= s(y')} grad
                   log pi(y') ]:
                   A_j = 1/n - P(j wins T) + (lambda_N / n) (1{s* >= s_j} - P(max_{i in T} s_i >= s_j | j not in T))
                   (1/n is a control variate: E[grad log pi] = 0; it makes N = 1 plain SFT)
      exact        scores 0 and 1, p the failure rate: log pi_bon(y*) = log pi(y*) + log((1 - p^N) / (1 - p)) for a
                   right y*, log pi(y*) + (N-1) log p for a wrong one; with grad p = E[(1{s = 0} - p) grad log pi],
                   A_j = ((1{s_j = 0} - p) / n) w,  w = 1 / (1-p) - N p^(N-1) / (1 - p^N)  or  w = (N-1) / p
    p_fail: (B,), p in (0, 1), if known; else the share of failures among the n samples, clipped to [0.01, 0.99].
    Raises ValueError unless 1 <= N < n (or N = 1), for scores that are not finite, and for an unknown likelihood.
    """
    (B, n), dtype = scores.shape, scores.dtype if scores.is_floating_point() else torch.float32
    if likelihood not in ("variational", "exact"):
        raise ValueError(f"unknown likelihood {likelihood!r}: choose variational or exact")
    if N < 1 or (N > 1 and n <= N):
        raise ValueError(f"N must be at least 1 and less than n, not N={N} with n={n} samples")
    every = torch.cat([expert_scores.unsqueeze(-1), scores], -1)  # (B, 1 + n)
    if not every.isfinite().all():
        where = (~every.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"scores must be finite: see (prompt, sample, the expert being 0) {where}")
    if N == 1:
        A = torch.zeros_like(scores)
    elif likelihood == "variational":
        inside = torch.nn.functional.pad(common.subset_weights(n - 1, N).cumsum(0), (1, 0))  # (n,): C(j, N) / C(n-1, N)
        below = inside.to(scores.device)[common.ranks(scores)[0]]  # (B, n): P(max of T < s_j | j not in T)
        tilt = common.best_of_n_tilt(N) / n * (below - (expert_scores.unsqueeze(-1) < scores).double())
        A = 1 / n - common.win_shares(scores, N) + tilt
    else:
        if not ((every == 0) | (every == 1)).all():
            raise ValueError("the exact likelihood needs scores that are 0 or 1")
        fail = 1 - scores.double()
        p = (fail.mean(-1).clamp(0.01, 0.99) if p_fail is None else p_fail.double()).unsqueeze(-1)  # (B, 1)
        right = 1 / (1 - p) - N * p ** (N - 1) / (1 - p**N)
        A = (fail - p) / n * torch.where(expert_scores.unsqueeze(-1) == 1, right, (N - 1) / p)
    return torch.cat([torch.ones(B, 1, dtype=dtype, device=scores.device), A.to(dtype)], -1)


# ---------------------------------------------------------------------------------------------------------------------


def with_experts(problems: list, path: str) -> list:
    """The problems that the file has responses to, those being their solutions. Raises BadInput."""
    rows = load_rows("", "train", path)
    require_columns(rows, ["problem", "response"], path)
    of_prompt, result = {problem.prompt: problem for problem in problems}, []
    for number, row in enumerate(rows, start=1):
        problem = of_prompt.get(row["problem"]) if isinstance(row["problem"], str) else None
        if problem is None:
            raise BadInput(
                f"{path}, row {number}: {str(row['problem'])[:40]!r} is not among the task's training problems"
            )
        if not isinstance(row["response"], str) or not row["response"]:
            raise BadInput(f"{path}, row {number}: the response must be a text, not {str(row['response'])[:40]!r}")
        result.append(replace(problem, solution=row["response"]))
    return result


def check_args(args: Args) -> None:
    """Raise BadInput for arguments out of range or that do not go together."""
    common.check_args(replace(args, n=args.N if args.N == 1 else args.n))
    if args.N > 1 and args.n <= args.N:
        raise BadInput(f"--n must be more than --N {args.N}, not {args.n}: a winner is compared with other samples")
    if not 1 <= args.eval_N <= args.eval_n:
        raise BadInput(f"--eval-N must lie between 1 and --eval-n {args.eval_n}, not {args.eval_N}")
    if args.likelihood == "exact" and args.verifier == "learned":
        raise BadInput("--likelihood exact is a closed form for --verifier environment")


def main(args: Args) -> None:
    args.n = 2 * args.N if args.n is None else args.n
    args.eval_N = args.N if args.eval_N is None else args.eval_N
    check_args(args)
    task = load_task(args.task, args.data, args.sandbox)
    args.max_new_tokens = task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    test_problems = common.evaluation_problems(common.problems_at(task.test, (), "held-out"), args.eval_problems)
    train_problems = common.problems_at(task.train, args.levels, "training") if args.steps else test_problems
    if args.steps:
        train_problems = with_experts(train_problems, args.experts) if args.experts else train_problems
        if not all(problem.solution for problem in train_problems):
            raise BadInput(f"task {args.task!r} has problems without a solution: give responses to them by --experts")
    device = "cpu" if args.fsdp else args.device  # common.shard moves it, layer by layer
    policy = common.load_policy(args.model, task, device, args.gradient_checkpointing)
    if args.show_prompt:
        print(policy.tokenizer.decode(common.encode_prompts(policy, task, train_problems[:1], args.max_new_tokens)[0]))
        return
    for problems in (train_problems, test_problems):  # what is too long is refused now, not at step 300
        prompts = common.encode_prompts(policy, task, problems, args.max_new_tokens)
        if problems is train_problems and args.steps:
            common.expert_rollouts(policy, task, prompts, [problem.solution for problem in problems])
    if args.fsdp:
        common.shard(args.device, policy)
    verifier = None
    if args.verifier == "learned":
        verifier = common.load_learned_verifier(task, policy, test_problems, args)
        task = learned.with_scores(task, verifier)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    parts = [args.task, args.model, args.likelihood, args.verifier, f"N{args.N}", f"n{args.n}", f"s{args.seed}"]
    run = common.Run(args, parts, policy=policy.model, optimizer=optimizer)
    if verifier and not args.verifier_model and common.world()[0] == 0:
        verifier.save(run.folder / "verifier")

    ks = common.powers_of_two(args.eval_n, args.eval_N)
    selected = "bon" if args.verifier == "learned" else "pass"  # the environment's own Best-of-N is pass@N

    def evaluate(step: int) -> dict[str, torch.Tensor]:
        verdict = common.evaluate(policy, task, test_problems, args)
        if args.likelihood == "exact" and set(verdict.rewards.unique().tolist()) - {0, 1}:
            raise BadInput(f"--likelihood exact is for rewards 0 and 1, task {args.task!r} has others: use variational")
        metrics = {f"pass@{j}": common.pass_at_k(verdict.rewards, j) for j in ks}  # each (P,)
        if args.verifier == "learned":
            metrics |= {f"bon@{j}": common.best_of_k(verdict.scores, verdict.rewards, j) for j in ks}
        run.progress["history"].append((step, common.by_level(metrics, test_problems)))
        run.log({"step": step, "eval": run.progress["history"][-1][1], **verdict.counts})
        if verdict.counts:
            tqdm.write(f"evaluation at step {step}, events in the verifier: {verdict.counts}")
        return metrics

    if "before" not in run.progress:
        run.progress["before"] = evaluate(0)
    for step in run.steps(f"{args.likelihood} N={args.N}"):
        start = time.perf_counter()
        problems = common.share(common.training_batch(train_problems, step - 1, args.prompts_per_step, args.seed))
        prompts = common.encode_prompts(policy, task, problems, args.max_new_tokens)
        experts = common.expert_rollouts(policy, task, prompts, [problem.solution for problem in problems])  # (B, 1, T)
        rollouts = experts
        if args.N > 1:
            generator = common.step_generator(policy.device, args.seed, step)
            samples = common.sample(policy, prompts, args.n, args.max_new_tokens, args.temperature, generator)
            rollouts = common.joined(experts, samples)  # (B, 1 + n, T)
        verdict = common.judged(task, problems, common.decode(policy, rollouts))
        A = coefficients(verdict.scores[:, 0], verdict.scores[:, 1:], args.N, args.likelihood)  # (B, 1 + n)
        stats = common.policy_gradient_step(policy, optimizer, rollouts, A, args)
        record = {
            "step": step,
            "expert_reward": verdict.rewards[:, 0].mean().item(),
            **({"reward": verdict.rewards[:, 1:].mean().item()} if args.N > 1 else {}),
            **stats,
            **verdict.counts,
        }
        timings = common.step_timings(policy, rollouts, verdict, start)
        run.log(record, timings, [name for name in (*record, "tokens_per_s") if name not in ("step", "skipped")])
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.progress["after"] = evaluate(step)

    before, after = run.progress["before"], run.progress.get("after")
    if args.steps:
        common.save_policy(policy, run.folder / "policy")
    columns = [f"{selected}@{j}" for j in sorted({1, args.eval_N, args.eval_n})]
    columns += [f"pass@{args.eval_N}"] if args.verifier == "learned" else []
    print(common.comparison_table(before, after, test_problems, columns))
    names = ["pass", "bon"] if args.verifier == "learned" else ["pass"]
    common.save_figure(run.folder, run.progress["history"], run.progress["rewards"], names, args.eval_N)
    print(f"{run.folder}: metrics.jsonl, curves.png{', policy/' if args.steps else ''}")


if __name__ == "__main__":
    common.run_cli(main, Args)
