"""What all algorithms share: exact k-sample metrics and control variates, sampling, and the training step.

Data flows one way: prompts -> `sample` -> a verifier -> advantages (each script's own) -> `policy_gradient_step`.
Shapes: B prompts, n responses to each, T tokens in the longest response, R rows (one response each), V vocabulary.
Papers: Tang et al. (arXiv 2503.19595), Chow et al. (2412.15287), PKPO (Walder, Karkhanis, 2505.15201).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from verifiers import BadInput

# --- k-sample objectives and their control variates: pure functions of tensors ----------------------------------------


def k_sample_advantages(
    metric: "Callable[..., torch.Tensor]", *samples: torch.Tensor, k: int, estimator: str = "unbiased"
) -> torch.Tensor:
    """Leave-one-out advantages A of any k-sample objective E[f(y_1..y_k)] (Tang, Lemma 1), from its metric alone.

      unbiased  A_i = M_k - (1 - k/n) M_k(-i) - (k/n) M_{k-1}(-i)        the gradient of E[f] of k samples
                    = (k/n) mean over k-subsets T containing i of [ f(T) - f(T without i) ]
      biased    A_i = M_{k-1} - M_{k-1}(-i)                              each T centred (Tang): E[f] of k-1 samples

    M_j is the metric of all n samples, M_j(-i) the metric without the i-th, M_0 = 0. With k = 1 biased is zero, and
    unbiased is RLOO: it has M_1(-i) in place of M_0. A single sample (n = 1) has no baseline.

    metric: metric(*samples, j) maps tensors (rows, m) to (rows,) float64, the mean of the symmetric function f over all
    j-subsets of a row's m samples, 1 <= j <= m. samples: one or more tensors (B, n), n >= k. Returns (B, n) float64, to
    be used as sum_i A_i grad log pi(y_i), a sum over the n samples. Memory grows as B n^2. Raises ValueError unless
    1 <= k <= n, and for any other estimator.
    Example: pass_at_k with k = 2 and rewards 3, 1, 0. The pairs have the maxima 3, 3, 1: M_2 = 7/3. Without the first
    sample M_2(-1) = max(1, 0) = 1 and M_1(-1) = 1/2. A_1 = 7/3 - 1/3 - 1/3 = 5/3 = (2/3) mean(3 - 1, 3 - 0)."""
    n = samples[0].shape[-1]
    samples = [s.double() if s.is_floating_point() else s for s in samples]  # float32 would leave 1e-8 where A is 0
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"unknown estimator {estimator!r}: choose unbiased or biased")
    others = torch.arange(n).repeat(n, 1)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)  # row i: all but i

    def M(j: int) -> torch.Tensor:
        return metric(*samples, j).unsqueeze(-1)  # (B, 1)

    def M_without(j: int) -> torch.Tensor:
        left = (s[..., others.to(s.device)].flatten(0, 1) for s in samples)  # (B, n) -> (B, n, n-1) -> (B n, n-1)
        return metric(*left, j).view(-1, n)  # (B n,) -> (B, n)

    if estimator == "biased":
        terms = [M(k - 1), -M_without(k - 1)] if k > 1 else [0 * M(k).expand(-1, n)]
    else:
        terms = [M(k)]
        terms += [-(1 - k / n) * M_without(k)] if k < n else []
        terms += [-k / n * M_without(max(k - 1, 1))] if n > 1 else []
    A = sum(terms)
    # Rounding leaves 1e-15 where A is zero. Exact zeros save time: training skips rows without an advantage.
    scale = sum(term.abs() for term in terms).amax(-1, keepdim=True)  # (B, 1)
    return A.masked_fill(A.abs() <= 1e-12 * scale, 0)


def mean_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages of the mean reward, the baseline of every script: A_i = (1/n) (r_i - mean_{j != i} r_j)  (RLOO).

    rewards: (B, n) of floating point. Returns (B, n), to be used as a sum over samples. With n = 1 A = r."""
    n = rewards.shape[-1]
    if n == 1:
        return rewards.clone()
    rewards = rewards - rewards[..., :1]  # A stays the same; equal rewards become exact zeros, which training skips
    return (rewards - rewards.mean(-1, keepdim=True)) / (n - 1)


def checked_rewards(rewards: torch.Tensor, k: int, name: str = "rewards") -> torch.Tensor:
    """The rewards (B, n) in floating point. Raises ValueError unless 1 <= k <= n, and if one is not finite."""
    if not 1 <= k <= rewards.shape[-1]:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={rewards.shape[-1]} samples")
    if not rewards.isfinite().all():
        raise ValueError(f"{name} must be finite: see (prompt, sample) {(~rewards.isfinite()).nonzero()[0].tolist()}")
    return rewards if rewards.is_floating_point() else rewards.float()


def subset_weights(n: int, k: int) -> torch.Tensor:
    """Share of the k-subsets of n sorted samples whose last is the i-th: C(i-1, k-1) / C(n, k), i = 1..n. (n,) float64.

    The product form neither overflows nor cancels: w_n = k/n and w_i = w_{i+1} (i+1-k)/i."""
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    i = torch.arange(n - 1, 0, -1, dtype=torch.float64)  # n-1 .. 1
    ratios = ((i + 1 - k) / i).clamp(min=0)
    return torch.cat([torch.full((1,), k / n, dtype=torch.float64), k / n * ratios.cumprod(0)]).flip(0)


def ranks(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of lower, and of lower-or-equal, scores in the row of each sample: two tensors (B, n) int64."""
    scores = scores.to(torch.uint8) if scores.dtype == torch.bool else scores.contiguous()
    ordered = scores.sort(dim=-1).values
    return torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)


def win_shares(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Chance that the i-th of n samples wins (scores highest) in a random k-subset; equal scores share.

    scores: (B, n), n >= k. Returns (B, n) float64, each row with sum 1. Raises ValueError unless 1 <= k <= n."""
    inside = subset_weights(scores.shape[-1], k).cumsum(0).to(scores.device)
    inside = torch.nn.functional.pad(inside, (1, 0))  # (n+1,): C(j, k) / C(n, k)
    low, high = ranks(scores)
    return (inside[high] - inside[low]) / (high - low)


def best_of_k(scores: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Best-of-k: the expected reward of the sample that scores highest among k, over all k-subsets of n, exactly.

    scores, rewards: (B, n). A tie has its mean reward. Returns (B,) float64. Raises ValueError unless 1 <= k <= n."""
    return (win_shares(scores, k) * rewards).sum(-1)


def pass_at_k(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """pass@k, and max@k for real-valued rewards: the mean of max over all k-subsets of n samples, exactly.

    rewards: (B, n). Returns (B,) float64; 1 - C(n-c, k) / C(n, k) for 0/1. Raises ValueError unless 1 <= k <= n."""
    return best_of_k(rewards, rewards, k)


def best_of_n_tilt(N: int) -> float:
    """lambda_N of Chow's variational form pi_bon ~ pi exp(lambda_N Q) / Z: 0 for N = 1, about N + 1 from N = 8 on.

    It is the root of

        ((l-1) e^l + 1) / (e^l - 1) - log((e^l - 1) / l)  =  log N - (N-1)/N

    at which a uniform win rate Q has the KL of Best-of-N. Bisection finds it. The left side is written in e^-l, which
    neither overflows nor cancels at large l. Raises ValueError for N < 1."""
    if N < 1:
        raise ValueError(f"N must be at least 1, not {N}")
    low, high = 0.0, N + 2.0
    while N > 1 and low < (middle := (low + high) / 2) < high:
        rest = -math.expm1(-middle)  # 1 - e^-l
        distance = middle * math.exp(-middle) / rest - 1 - math.log(rest / middle)
        low, high = (middle, high) if distance < math.log(N) - (N - 1) / N else (low, middle)
    return low


# --- Policy and samples -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Policy:
    """A causal language model, its tokenizer, and the tokens that end a response.

    sample_rows: responses sampled at once. micro_batch_tokens: tokens in one forward and backward pass. Both are halved
    when memory runs out. Both change samples and gradient by rounding alone."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: list[int]
    sample_rows: int = 1024
    micro_batch_tokens: int = 16384

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclasses.dataclass
class Rollouts:
    """n responses to each of B prompts, as token ids: nothing is ever decoded and tokenized again.

    prompts: B lists of token ids. ids: (B, n, T) int64. mask: (B, n, T) bool, true at the tokens of a response, its
    end token included, and false at the padding. log_probs: (B, n, T) float32, of the distribution that was
    sampled from, 0 at padding. temperature: of that distribution. Training differentiates the same one."""

    prompts: list[list[int]]
    ids: torch.Tensor
    mask: torch.Tensor
    log_probs: torch.Tensor
    temperature: float = 1.0

    def flat(self) -> tuple:
        """One row a response: R = B n prompts, a list, then ids, mask and log_probs, each (R, T)."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.ids.shape[1])]
        return prompts, *(x.flatten(0, 1) for x in (self.ids, self.mask, self.log_probs))  # (B, n, T) -> (R, T)


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one (R, L) int64 tensor, filled with 0, and its (R, L) bool mask of real tokens."""
    side = {"batch_first": True, "padding_side": "left" if left else "right"}
    ids = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], **side)  # (R, L)
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], **side)


def logits(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits (..., V) float32 of last hidden states (..., H)."""
    scores = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    return scores if cap is None else cap * torch.tanh(scores / cap)


def recompute_activations(model: torch.nn.Module, on: bool) -> None:
    """Turn gradient checkpointing, if enabled, on or off. Transformers ties it to the training mode of its modules."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA; float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def halve_on_oom(amount: int, least: int, error: Exception, what: str) -> int:
    """Half of an amount that did not fit in memory. Raises any other error again, and BadInput if amount <= least."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")  # torch's, Linux's, cuBLAS's
    if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(x in str(error) for x in words)):
        raise error
    if amount <= least:
        mend = "use a smaller model, shorter responses or gradient checkpointing"
        raise BadInput(f"out of memory with one response at a time: {mend}") from error
    tqdm.write(f"out of memory: going on with {what} = {amount // 2}")
    return amount // 2


class CompactCache(DynamicCache):
    """Keys are kept in the dtype of values. Under autocast rotary embeddings make keys float32: twice the memory."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *where, **options) -> tuple:
        return super().update(key_states.to(value_states.dtype), value_states, *where, **options)


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether training may read a prompt once for all its rows. Every layer must be attention: linear attention updates
    its state in place, which cannot be differentiated. Gradient checkpointing must be off: it rules a cache out."""
    plain = (type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in CompactCache(config=model.config).layers)
    return all(plain) and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@torch.no_grad()
def sample(
    policy: Policy, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:  # fmt: skip
    """n responses to each prompt by pure temperature sampling, each up to and including its end token.

    Each response and position has its own random number: `policy.sample_rows` changes tokens by rounding alone.
    Computes and returns on the policy's device. Raises BadInput when memory runs out with a single response."""
    recompute_activations(policy.model, False)
    rows = [prompt for prompt in prompts for _ in range(n)]
    uniform = torch.rand(len(rows), max_new_tokens, generator=generator, device=policy.device)  # (R, max_new_tokens)
    parts, start = [], 0
    while start < len(rows):
        part = slice(start, start + policy.sample_rows)
        try:
            parts.append(sampled_rows(policy, rows[part], uniform[part], temperature))
            start = part.stop
        except (RuntimeError, MemoryError) as error:
            policy.sample_rows = halve_on_oom(min(policy.sample_rows, len(rows)), 1, error, "sample_rows")
    ids, mask, log_probs = (torch.cat(x) for x in zip(*parts))  # (R, max_new_tokens) each
    T = int(mask.any(0).sum())
    return Rollouts(prompts, *(x[:, :T].unflatten(0, (-1, n)) for x in (ids, mask, log_probs)), temperature)


def read_prompts(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> tuple:
    """R prompts, equal ones read once: last hidden states (R, 1, H), cache, mask (R, P), last positions (R, 1)."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    of_row = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)  # (R,): among G prompts
    ids, seen = (x.to(model.device) for x in padded(list(place), left=True))  # (G, P)
    position, cache = seen.cumsum(-1) - 1, CompactCache(config=model.config)
    inputs = {"input_ids": ids, "attention_mask": seen.long(), "position_ids": position.clamp(min=0)}
    hidden = model.base_model(**inputs, cache=cache, use_cache=True).last_hidden_state[:, -1:]
    # index_select, not x[of_row]: the gradient of the latter is summed in thread order, which varies on the CPU.
    cache.reorder_cache(of_row)
    return hidden.index_select(0, of_row), cache, seen[of_row], position[of_row, -1:]  # (G, ...) -> (R, ...)


def sampled_rows(policy: Policy, prompts: list[list[int]], uniform: torch.Tensor, temperature: float) -> tuple:
    """One response to each of R prompts, from the uniform random numbers (R, T): ids, mask and log_probs, each (R, T).
    Finished rows leave the batch when half of it is done."""
    model, device, (R, T) = policy.model, policy.device, uniform.shape
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    ids = torch.zeros(R, T, dtype=torch.int64, device=device)
    mask, log_probs = torch.zeros(R, T, dtype=torch.bool, device=device), torch.zeros(R, T, device=device)
    rows = torch.arange(R, device=device)  # those still in the batch
    alive = torch.ones(R, dtype=torch.bool, device=device)  # among these
    with autocast(device):
        hidden, cache, seen, position = read_prompts(model, prompts)
        for t in range(T):
            log_p = (logits(model, hidden[:, -1]) / temperature).log_softmax(-1)  # (rows, V)
            total = log_p.exp().cumsum_(-1)  # (rows, V): the distribution function, up to rounding of its end
            token = torch.searchsorted(total, uniform[rows, t].unsqueeze(-1) * total[:, -1:], right=True)  # (rows, 1)
            token = token.clamp(max=total.shape[-1] - 1)  # where the logits are nan
            live = rows[alive]
            ids[live, t] = token[alive, 0]
            mask[live, t] = True
            log_probs[live, t] = log_p.gather(-1, token)[alive, 0]
            alive = alive & ~torch.isin(token[:, 0], stop_ids)
            running = int(alive.sum())
            if running == 0 or t == T - 1:
                break
            if running <= len(rows) // 2:
                cache.reorder_cache(alive.nonzero()[:, 0])
                rows, token, seen, position = rows[alive], token[alive], seen[alive], position[alive]
                alive = alive[alive]
            seen, position = F.pad(seen, (0, 1), value=True), position + 1
            # A model without attention (Mamba) would apply the whole mask to this one token.
            inputs = {"input_ids": token, "attention_mask": None if all(cache.is_linear) else seen.long()}
            inputs["position_ids"] = position
            hidden = model.base_model(**inputs, cache=cache, use_cache=True).last_hidden_state
    return ids, mask, log_probs


def decode(policy: Policy, rollouts: Rollouts) -> list[list[str]]:
    """The responses as text, special tokens and end tokens left out: B lists of n strings.

    Each is decoded behind the last token of its prompt that is text, which is then cut off. Llama's tokenizers drop the
    space that begins a text: decoded alone, an indented program would lose one column. Of a token for a part of a
    character, the bytes would be read together with those of the response: it is no text."""
    decoded = functools.partial(policy.tokenizer.batch_decode, skip_special_tokens=True)
    added = policy.tokenizer.added_tokens_decoder.items()
    silent, texts = {*policy.stop_ids, *(i for i, token in added if token.special)}, []
    for prompt, *group in zip(rollouts.prompts, rollouts.ids.cpu(), rollouts.mask.cpu()):
        alone = ([i] for i in reversed(prompt) if i not in silent)
        before = next((row for row in alone if "\ufffd" not in decoded([row])[0]), [])
        rows = [before + [i for i in ids[keep].tolist() if i not in silent] for ids, keep in zip(*group)]
        last, *row = decoded([before, *rows])
        texts.append([text.removeprefix(last) for text in row])
    return texts


# --- Training step ----------------------------------------------------------------------------------------------------

LOGITS_PER_CHUNK = 2**25  # float32 logits held at once: 128 MiB for any vocabulary


def micro_batches(rollouts: Rollouts, rows: torch.Tensor, budget: int) -> Iterator[tuple]:
    """The given rows (any of the R = B n, int64) of the rollouts, longest first, in micro-batches of at most `budget`
    tokens, or of one row. A micro-batch has U * (longest prompt + longest response) tokens.

    Equal rows are computed once: a policy that has learnt to answer often repeats a response. Yields for R' rows, U of
    them different: rows, (R',) int64, their indices in the R; of_row, (R',) int64, each one's index in the U;
    prompts, U lists of ids; ids and mask, (U, T), T the longest response among them."""
    prompts, ids, mask, _ = rollouts.flat()
    same: dict[tuple, list[int]] = {}
    filled, responses = ids.masked_fill(~mask, -1).cpu(), mask.sum(-1).tolist()
    for row, tokens in zip(rows.tolist(), filled[rows.cpu()].tolist()):
        same.setdefault((*prompts[row], *tokens), []).append(row)

    def size(group: list[int]) -> tuple[int, int]:
        return len(prompts[group[0]]), responses[group[0]]

    groups = sorted(same.values(), key=lambda group: -sum(size(group)))
    while groups:
        U, P, T = 0, 0, 0
        for group in groups:  # as many as fit
            P, T = max(P, size(group)[0]), max(T, size(group)[1])
            if U and (U + 1) * (P + T) > budget:
                break
            U += 1
        part, groups = groups[:U], groups[U:]
        first = [group[0] for group in part]
        of_row = torch.tensor([place for place, group in enumerate(part) for _ in group], device=ids.device)
        T = max(responses[row] for row in first)
        rows = torch.tensor([row for group in part for row in group])
        yield rows, of_row, [prompts[row] for row in first], ids[first, :T], mask[first, :T]


def halving(policy: Policy, rollouts: Rollouts, compute: Callable):
    """compute(), a pass over micro-batches of these rollouts. Whenever memory runs out it starts again, with half of
    `policy.micro_batch_tokens`. Raises BadInput if one row does not fit in memory."""
    longest = max(map(len, rollouts.prompts)) + rollouts.ids.shape[-1]
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            policy.micro_batch_tokens = halve_on_oom(policy.micro_batch_tokens, longest, error, "micro_batch_tokens")


def response_states(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The last hidden states from which the response tokens ids[mask] are predicted, (M, H). Differentiable.

    prompts: R lists of ids. ids, mask: (R, T), on the model's device. Rows with equal prompts share one pass over them
    where the model can (`can_share_prompts`), unless that saves little."""
    recompute_activations(model, torch.is_grad_enabled())
    tokens, different = sum(map(len, prompts)), sum(map(len, set(map(tuple, prompts))))
    saves = ids.shape[1] > 1 and 10 * (tokens - different) >= tokens + int(mask.sum())
    if saves and can_share_prompts(model):
        first, cache, seen, position = read_prompts(model, prompts)
        seen = F.pad(seen, (0, ids.shape[1] - 1), value=True).long()  # (R, P + T - 1)
        position = position + torch.arange(1, ids.shape[1], device=ids.device)  # (R, T-1)
        inputs = {"input_ids": ids[:, :-1], "attention_mask": seen, "position_ids": position}
        rest = model.base_model(**inputs, cache=cache, use_cache=True).last_hidden_state
        return torch.cat([first, rest], 1)[mask]  # (R, 1, H) and (R, T-1, H) -> (R, T, H) -> (M, H)
    # Padding stands on the right, where causal attention never looks: no mask is needed, and fast kernels apply.
    rows = [[*prompt, *row[keep][:-1].tolist()] for prompt, row, keep in zip(prompts, ids.cpu(), mask.cpu())]
    states = model.base_model(input_ids=padded(rows)[0].to(ids.device), use_cache=False).last_hidden_state
    before = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device).unsqueeze(-1)  # (R, 1)
    column = torch.arange(states.shape[1], device=ids.device)  # (L,)
    return states[(column >= before) & (column < before + mask.sum(-1, keepdim=True))]  # (R, L, H) -> (M, H)


def response_log_probs(
    policy: Policy, prompts: Sequence[Sequence[int]], ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(token | prompt, earlier tokens) of each response token; (R, T) float32, 0 where mask is false.

    prompts: R lists of ids. ids, mask: (R, T), as in `Rollouts`. Differentiable. The output layer reads the response
    positions only, a chunk at a time, and again in the backward pass: no (R, T, V) tensor ever exists."""
    model, ids, mask = policy.model, ids.to(policy.device), mask.to(policy.device)

    def token_log_probs(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = logits(model, hidden)
        scores = scores if temperature == 1 else scores / temperature  # dividing by 1 would copy all logits
        return -F.cross_entropy(scores, targets, reduction="none")

    with autocast(policy.device):
        hidden = response_states(model, prompts, ids, mask)  # (M, H)
        size = max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
        chunks = zip(hidden.split(size), ids[mask].split(size))
        parts = [checkpoint(token_log_probs, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, torch.cat(parts))  # (M,) -> (R, T)


def accumulate_gradient(policy: Policy, rollouts: Rollouts, advantages: torch.Tensor, clip: float | None = None):
    """Add the gradient of the policy-gradient loss to the parameters' .grad, and return the loss, a float.

        loss = -(1/B) sum_b sum_i A_bi log pi(y_bi)        a sum over a prompt's samples, a mean over prompts

    advantages: (B, n). clip: None, or PPO's epsilon: log pi(y) is then replaced, token by token, by the clipped ratio
    to the log-probs of sampling; the gradients are the same where the ratio is 1. Rows of advantage 0 are left out."""
    old, total = rollouts.log_probs.flatten(0, 1), 0.0  # (B, n, T) -> (R, T)
    advantages = advantages.flatten().to(policy.device, torch.float32)  # (B, n) -> (R,)
    chosen = advantages.nonzero()[:, 0]
    for rows, of_row, prompts, ids, mask in micro_batches(rollouts, chosen, policy.micro_batch_tokens):
        log_p = response_log_probs(policy, prompts, ids, mask, rollouts.temperature)  # (U, T)
        log_p, A = log_p.index_select(0, of_row), advantages[rows].unsqueeze(-1)  # (R', T), (R', 1)
        if clip is None:
            objective = A * log_p
        else:
            ratio = (log_p - old[rows, : log_p.shape[1]]).exp()
            objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) * mask[of_row]
        loss = -objective.sum() / len(rollouts.prompts)
        loss.backward()
        total += loss.item()
    return total


def zero_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Zeros, not None: a step without a signal is a step of the optimiser, also right after a resume."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()


def policy_gradient_step(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: torch.Tensor,
    max_grad_norm: float = 1.0, epochs: int = 1, clip: float = 0.2,
    average_gradients: Callable[[Iterable[torch.nn.Parameter]], None] = lambda parameters: None,
) -> dict[str, float]:  # fmt: skip
    """`epochs` optimiser steps on the same rollouts, PPO-clipped by `clip` if there are several (Tang).

    advantages: (B, n), sum convention. average_gradients: several processes call it before gradients are clipped.
    Returns loss and grad_norm of the last step, nonzero_advantage (share of the rows), and skipped (1 if a gradient
    was not finite: its step leaves the policy as it was). Raises BadInput if one row does not fit."""
    skipped, parameters = 0, list(policy.model.parameters())

    def gradient() -> float:
        zero_gradients(parameters)
        return accumulate_gradient(policy, rollouts, advantages, clip if epochs > 1 else None)

    for _ in range(epochs):
        loss = halving(policy, rollouts, gradient)
        average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if norm.isfinite():
            optimizer.step()
        skipped |= not norm.isfinite()
    nonzero = (advantages != 0).float().mean().item()
    return {"loss": loss, "grad_norm": norm.item(), "nonzero_advantage": nonzero, "skipped": skipped}


@torch.no_grad()
def log_ratios(policy: Policy, reference: Policy, rollouts: Rollouts) -> torch.Tensor:
    """log pi(token) - log pi_ref(token) of each response token, (B, n, T) float32 on the CPU, 0 at padding.

    Both policies make the same pass over the same rows and round alike: a policy that has not moved has ratios of
    exactly 0. With the log-probs of sampling they would be 1e-7, which AdamW turns into full steps. Raises BadInput."""

    def compute() -> torch.Tensor:
        ratios = torch.zeros(rollouts.mask.flatten(0, 1).shape)  # (R, T)
        for rows, of_row, *batch in micro_batches(rollouts, torch.arange(len(ratios)), policy.micro_batch_tokens):
            ours, theirs = (response_log_probs(x, *batch, rollouts.temperature) for x in (policy, reference))
            difference = (ours - theirs).cpu()  # (U, T')
            ratios[rows, : difference.shape[1]] = difference[of_row.cpu()]  # (R', T')
        return ratios.view(rollouts.ids.shape)  # (R, T) -> (B, n, T)

    return halving(policy, rollouts, compute)


def kl_advantages(ratios: torch.Tensor) -> torch.Tensor:
    """Advantages (B, n) of the objective -KL(pi || pi_ref), n >= 2. Tang trains J_k - beta KL: add beta times these.

    ratios: (B, n, T) from `log_ratios`. -KL is the mean of the per-sample reward -log(pi(y) / pi_ref(y)): it has its
    own leave-one-out baseline and never passes through max or a vote."""
    return mean_advantages(-ratios.sum(-1))


def kl_estimate(ratios: torch.Tensor) -> float:
    """KL(pi || pi_ref) in nats a response, from the log ratios of tokens (B, n, T): the mean of 1/w - 1 + log w with
    w = pi / pi_ref of a token, summed over tokens. It is unbiased where pi covers pi_ref and, unlike the mean of log w,
    never negative (Schulman's k3)."""
    ratios = ratios.double()
    return (torch.expm1(-ratios) + ratios).sum(-1).mean().item()
