"""What a policy scores on `lines`, without sampling: 1 to 8 responses fit a prompt, and each is right with chance q.

    problems = optima.prompts_once()
    log_pi = candidate_log_probs(policy, task, problems)
    metrics = exact_metrics(log_pi, problems)
    optima.prompt_weights(problems) @ metrics["pass@8"]

The weighted mean over all held-out prompts is what sampling fresh problems, answers and responses tends to.

    python benchmarks/exact.py                                  # tiny, as warm-started
    python benchmarks/exact.py --model runs/NAME/policy         # after training
"""

from collections.abc import Sequence
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import optima
import torch
import tyro

import common
from harness.policy import encode_prompts, expert_rollouts, load_policy
from verifiers import Problem, Task, load_task
from verifiers.lines import fitting_lines, posterior


@dataclass
class Args:
    model: str = "tiny"
    """"tiny", "tiny-S" for the one from seed S, or a folder: runs/NAME/policy"""
    base: str = "tiny"
    """the policy that the KL is measured from"""


def candidate_log_probs(
    policy: common.Policy, task: Task, problems: Sequence[Problem], temperature: float = 1.0, rows: int = 2048
) -> torch.Tensor:
    """log pi(line and its end | prompt) of each prompt's fitting lines: (P, 8) float64, -inf behind them.

    In the order of `fitting_lines`. rows: responses in one forward pass. Differentiable, unless under torch.no_grad();
    a gradient of all held-out prompts at once wants their mean as one scalar, or smaller parts that add up.
    """
    candidates = [fitting_lines(problem.prompt) for problem in problems]
    prompts = encode_prompts(policy, task, problems, task.max_new_tokens)
    pairs = [(prompt, line) for prompt, lines in zip(prompts, candidates) for line in lines]
    values = []
    for i in range(0, len(pairs), rows):
        prompt_ids, responses = zip(*pairs[i : i + rows])
        rollouts = expert_rollouts(policy, task, list(prompt_ids), [[Problem("", "", line)] for line in responses])
        ids, mask = rollouts.ids.squeeze(1), rollouts.mask.squeeze(1)  # (R, 1, T) -> (R, T)
        log_probs = common.response_log_probs(policy, rollouts.prompts, ids, mask, temperature)
        values.append(log_probs.double().sum(-1).cpu())  # (R,)
    place = torch.tensor([i < len(lines) for lines in candidates for i in range(8)]).view(-1, 8)
    return torch.full(place.shape, -torch.inf, dtype=torch.float64).masked_scatter(place, torch.cat(values))


def exact_metrics(
    log_pi: torch.Tensor,
    problems: Sequence[Problem],
    name: str = "lines",
    base_log_pi: torch.Tensor | None = None,
    votes: Sequence[int] = (8,),
) -> dict[str, torch.Tensor]:
    """Exact metrics of each prompt, by name, (P,) float64 each: pass@1 to pass@32, maj@k for each k of `votes`,
    elsewhere (the probability of responses that do not fit) and, with base_log_pi, kl in nats from that policy.

    log_pi, base_log_pi: (P, 8) of `candidate_log_probs`. name: the task whose prior is meant. What is elsewhere is
    wrong; in a vote each such response is an answer of its own, which no other agrees with; in kl it is one response.
    """
    q, pi = posterior([problem.prompt for problem in problems], name), log_pi.exp()
    metrics = {f"pass@{k}": optima.pass_at_k(q, pi, k) for k in optima.TRIES}
    metrics |= {f"maj@{k}": optima.maj_at_k(q, pi, k) for k in votes}
    metrics["elsewhere"] = 1 - pi.sum(-1)
    if base_log_pi is not None:
        metrics["kl"] = optima.kl(pi, base_log_pi.exp())
    return metrics


def main(args: Args) -> None:
    task = load_task("lines")
    base, policy = (load_policy(model, task, "cpu") for model in (args.base, args.model))
    problems = optima.prompts_once()
    with torch.no_grad():
        base_log_pi, log_pi = (candidate_log_probs(p, task, problems) for p in (base, policy))
    metrics = exact_metrics(log_pi, problems, "lines", base_log_pi)
    weights = optima.prompt_weights(problems)
    levels = torch.tensor([problem.level for problem in problems])
    rows = [["all", *(f"{weights @ value:.3f}" for value in metrics.values())]]
    for level in levels.unique().tolist():
        share = weights * (levels == level) / weights[levels == level].sum()
        rows.append([level, *(f"{share @ value:.3f}" for value in metrics.values())])
    measure.print_table(["level", *metrics], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
