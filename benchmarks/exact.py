"""What a policy scores on `suspects`, without sampling: a prompt lists 2 to 8 names, and each is right with chance q.

    python benchmarks/exact.py                                  # tiny, as warm-started
    python benchmarks/exact.py --model runs/NAME/policy         # after training

The mean over levels is what sampling answers and responses to these prompts tends to.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import optima
import torch
import torch.nn.functional as F

import common
from harness.policy import encode_prompts, expert_rollouts, load_policy
from verifiers import Problem, Task, load_task
from verifiers.suspects import MOST, candidates, posterior


@dataclass
class Args:
    model: str = "tiny"  # "tiny", "tiny-S" for the one from seed S, or a folder: runs/NAME/policy
    base: str = "tiny"  # the policy that the KL is measured from


def candidate_log_probs(
    policy: common.Policy, task: Task, problems: Sequence[Problem], temperature: float = 1.0, prompts: int = 64
) -> torch.Tensor:
    """log pi(name and its end | prompt) of each prompt's listed names: (P, 8) float64, -inf behind them.

    In the order of `listed`. prompts: how many in one forward pass. Differentiable, unless under torch.no_grad(); a
    gradient of all held-out prompts at once wants their mean as one scalar, or smaller parts that add up.
    """
    parts = []
    for i in range(0, len(problems), prompts):
        some = problems[i : i + prompts]
        groups = [candidates(problem) for problem in some]
        rollouts = expert_rollouts(policy, task, encode_prompts(policy, task, some, task.max_new_tokens), groups)
        place = rollouts.mask.any(-1)  # (P, m): the most names of these prompts
        texts = [prompt for prompt, row in zip(rollouts.prompts, place.tolist()) for there in row if there]
        ids, mask = rollouts.ids[place], rollouts.mask[place]  # (P, m, T) -> (R, T)
        log_probs = common.response_log_probs(policy, texts, ids, mask, temperature).double().sum(-1)  # (R,)
        part = torch.full((len(place), MOST), -torch.inf, dtype=torch.float64)
        place = F.pad(place.cpu(), (0, MOST - place.shape[1]))  # (P, m) -> (P, 8)
        parts.append(part.masked_scatter(place, log_probs.cpu()))
    return torch.cat(parts)


def exact_metrics(
    log_pi: torch.Tensor, problems: Sequence[Problem], base_log_pi: torch.Tensor | None = None, votes: Sequence = (8,)
) -> dict[str, torch.Tensor]:
    """Exact metrics of each prompt, by name, (P,) float64 each: pass@1 to pass@32, maj@k for each k of `votes`,
    elsewhere (the probability of responses that are no listed name) and, with base_log_pi, kl in nats from that policy.

    log_pi, base_log_pi: (P, 8) of `candidate_log_probs`. What is elsewhere is wrong; in a vote each such response is an
    answer of its own, which no other agrees with; in kl it is one response.
    """
    q, pi = posterior([problem.prompt for problem in problems]), log_pi.exp()
    metrics = {f"pass@{k}": optima.pass_at_k(q, pi, k) for k in optima.TRIES}
    metrics |= {f"maj@{k}": optima.maj_at_k(q, pi, k) for k in votes}
    metrics["elsewhere"] = 1 - pi.sum(-1)
    if base_log_pi is not None:
        metrics["kl"] = optima.kl(pi, base_log_pi.exp())
    return metrics


def by_level(metrics: dict[str, torch.Tensor], problems: Sequence[Problem]) -> dict[str, dict[str, float]]:
    """Weighted means of metrics (P,): name -> level -> value, the levels being "all", "2", "3", ..."""
    weights, levels = optima.level_weights(problems), torch.tensor([problem.level for problem in problems])
    groups = {"all": torch.ones_like(weights)} | {str(x): (levels == x).double() for x in levels.unique().tolist()}
    shares = {level: weights * some / (weights @ some) for level, some in groups.items()}
    return {name: {level: (share @ value).item() for level, share in shares.items()} for name, value in metrics.items()}


@functools.cache
def the_task() -> Task:
    return load_task("suspects")


@functools.cache
def log_probs(model: str, held_out: bool = True, temperature: float = 1.0) -> torch.Tensor:
    """`candidate_log_probs` of a policy, by name or folder, for the fixed problems, held-out or of training: (P, 8)."""
    with torch.no_grad():
        policy = load_policy(model, the_task(), "cpu")
        return candidate_log_probs(policy, the_task(), optima.problems_of(held_out), temperature)


def evaluation(
    model: str, base: str, held_out: bool = True, temperature: float = 1.0, votes: Sequence[int] = (8,)
) -> dict[str, dict[str, float]]:
    """`exact_metrics` of a policy, with the KL from another, for the fixed problems: name -> level -> value."""
    problems = optima.problems_of(held_out)
    log_pi, base_log_pi = (log_probs(x, held_out, temperature) for x in (model, base))
    return by_level(exact_metrics(log_pi, problems, base_log_pi, votes), problems)


def main(args: Args) -> None:
    found = evaluation(args.model, args.base)
    rows = [[level, *(f"{found[name][level]:.3f}" for name in found)] for level in found["kl"]]
    measure.print_table(["level", *found], rows)


if __name__ == "__main__":
    measure.program(main, Args)
