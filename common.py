"""What all algorithms here share: a policy, its samples, exact k-sample metrics, the training step, the run folder.

Data flows one way: prompts -> `sample` -> verifier -> advantages (each script's own) -> `policy_gradient_step`.
Shapes: B prompts, n responses to each, T tokens in the longest response, R rows (one response each), V vocabulary.
Papers: Tang et al. (arXiv 2503.19595), Chow et al. (2412.15287), PKPO (Walder, Karkhanis, 2505.15201).
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import DynamicCache, logging as transformers_logging
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verifiers import BadInput, Problem, Task, Verdict, learned

# ---------------------------------------------------------------------------------------------------------------------
# Control variates and exact metrics: pure functions of tensors
# ---------------------------------------------------------------------------------------------------------------------


def leave_one_out(objective: Callable[..., torch.Tensor], *samples: torch.Tensor) -> torch.Tensor:
    """A_i = f(y_1..y_n) - f(y_{-i}): Tang's Lemma 1, for any symmetric objective f.

    objective: maps one or more tensors (..., m) to (...), for m = n and m = n - 1. samples: each (B, n), n >= 2.
    Returns (B, n). `sum_i A_i grad log pi(y_i)` (a sum over samples) is unbiased for the gradient of E[f].
    """
    n = samples[0].shape[-1]
    others = torch.arange(n).repeat(n, 1)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)  # row i: all but i
    without = objective(*(s[..., others.to(s.device)] for s in samples))  # (B, n, n-1) -> (B, n)
    return objective(*samples).unsqueeze(-1) - without


def subset_weights(n: int, k: int) -> torch.Tensor:
    """Share of the k-subsets of n sorted samples whose last is the i-th: C(i-1, k-1) / C(n, k), i = 1..n. (n,) float64.

    In product form, which neither overflows nor cancels: w_n = k/n and w_i = w_{i+1} (i+1-k)/i.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, not k={k} with n={n} samples")
    i = torch.arange(n - 1, 0, -1, dtype=torch.float64)  # n-1 .. 1
    ratios = ((i + 1 - k) / i).clamp(min=0)
    return torch.cat([torch.full((1,), k / n, dtype=torch.float64), k / n * ratios.cumprod(0)]).flip(0)


def win_shares(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Chance that the i-th of n samples wins (scores highest) in a random k-subset; equal scores share.

    scores: (B, n), n >= k. Returns (B, n) float64; rows sum to 1. Raises ValueError unless 1 <= k <= n.
    """
    inside = F.pad(subset_weights(scores.shape[-1], k).cumsum(0), (1, 0)).to(scores.device)  # (n+1,): C(j, k) / C(n, k)
    low, high = ranks(scores)
    return (inside[high] - inside[low]) / (high - low)


def ranks(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample of (B, n), how many of its row score less, and how many no more: twice (B, n) int64."""
    scores = scores.to(torch.uint8) if scores.dtype == torch.bool else scores.contiguous()
    ordered = scores.sort(dim=-1).values
    return torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)


def best_of_k(scores: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Best-of-k: the expected reward of the sample that scores highest among k, over all k-subsets of n, exactly.

    scores, rewards: (B, n), n >= k. Equal scores share: a tie's value is the mean reward of the tied samples.
    Returns (B,) float64. Raises ValueError unless 1 <= k <= n.
    """
    return (win_shares(scores, k) * rewards).sum(-1)


def best_of_k_without(scores: torch.Tensor, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """`best_of_k` of the other n - 1 samples, for each of the n: (B, n) float64, in O(n log n).

    scores, rewards: (B, n), n > k. Raises ValueError unless 1 <= k <= n - 1.
    """
    n = scores.shape[-1]
    inside = F.pad(subset_weights(n - 1, k).cumsum(0), (1, 0)).to(scores.device)  # (n,): C(j, k) / C(n-1, k)
    order = scores.argsort(dim=-1)
    (low, high), r = ranks(scores.gather(-1, order)), rewards.gather(-1, order).double()  # (B, n), upwards

    def prefix(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x.cumsum(-1), (1, 0))  # (B, n) -> (B, n+1): sums of the first 0..n

    # Without i, a score level below i's keeps its ranks, one above loses a rank, and i's own loses a member.
    level = high - low
    below = prefix((inside[high.clamp(max=n - 1)] - inside[low]) / level * r).gather(-1, low)
    above = prefix((inside[high - 1] - inside[(low - 1).clamp(min=0)]) / level * r)
    above = above[:, -1:] - above.gather(-1, high)
    others = prefix(r).gather(-1, high) - prefix(r).gather(-1, low) - r  # rewards of the rest of i's level
    own = (inside[high - 1] - inside[low]) * others / (level - 1).clamp(min=1)
    return torch.empty_like(r).scatter_(-1, order, below + own + above)


def pass_at_k(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """pass@k, and max@k for real-valued rewards: the mean of max over all k-subsets of n samples, exactly.

    rewards: (B, n), n >= k. Returns (B,) float64; for 0/1 rewards it is 1 - C(n-c, k) / C(n, k).
    Raises ValueError unless 1 <= k <= n.
    """
    return best_of_k(rewards, rewards, k)


def best_of_n_tilt(N: int) -> float:
    """lambda_N of Chow's variational form pi_bon ~ pi exp(lambda_N Q) / Z: 0 for N = 1, about N + 1 from N = 8 on.

    The tilt at which a uniform win rate Q is as far from pi as Best-of-N is, that is the root of

        ((l-1) e^l + 1) / (e^l - 1) - log((e^l - 1) / l)  =  log N - (N-1)/N

    by bisection in float64, with the left side written as l e^-l / (1 - e^-l) - 1 - log((1 - e^-l) / l), which neither
    overflows nor cancels at large l. Raises ValueError for N < 1.
    """
    if N < 1:
        raise ValueError(f"N must be at least 1, not {N}")
    low, high = 0.0, N + 2.0
    while N > 1 and low < (middle := (low + high) / 2) < high:
        rest = -math.expm1(-middle)  # 1 - e^-l
        distance = middle * math.exp(-middle) / rest - 1 - math.log(rest / middle)
        low, high = (middle, high) if distance < math.log(N) - (N - 1) / N else (low, middle)
    return low


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each has its share of the prompts, all have the same weights
# ---------------------------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) unless torchrun started more."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(problems: Sequence[Problem]) -> Sequence[Problem]:
    """This process's share: every `size`-th problem, from the `rank`-th on."""
    rank, size = world()
    return problems if size == 1 else problems[rank::size]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes: shares of equal size have the gradient of the whole."""
    for parameter in parameters:
        if world()[1] > 1 and not isinstance(parameter, DTensor):  # FSDP has averaged those that it shards
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()[1]


def shard(device: str, *policies: "Policy") -> None:
    """Spread the parameters of policies over the processes by FSDP2: each holds its part of every one, in `device`.

    A layer's parameters are gathered when it runs and dropped after it, but for those in a `gathered` block. What is
    trained is `parameters()`, DTensors now: make the optimizer after this, and copies of the policy before. Needs
    torchrun.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    mesh = init_device_mesh(kind, (world()[1],))
    for model in (policy.model for policy in policies):
        for module in list(model.modules()):
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        model.run, model.is_gathered = lambda function: function(), False
        register_fsdp_forward_method(model, "run")
        model.run(lambda: None)  # FSDP sets itself up at the first forward, which must be the whole model's


def sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP has spread its parameters over the processes."""
    return isinstance(model, FSDPModule)


def in_forward(model: torch.nn.Module, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What function() returns; parameters that are sharded are whole in it and in its backward pass, for FSDP takes it
    for the model's forward."""
    return model.run(function) if sharded(model) else function()


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within it a sharded model's parameters are whole, gathered once; all processes enter it, and may then run the
    model as often as each likes. No gradients. May be nested."""
    if not sharded(model) or model.is_gathered:
        yield
        return
    modules = [module for module in model.modules() if sharded(module)]
    model.is_gathered = True
    model.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        model.is_gathered = False
        model.set_reshard_after_forward(True)
        for module in modules:
            module.reshard()


def whole(state):
    """A state dict in which every tensor that was sharded is gathered, on the CPU; all processes must call it."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def load_whole(target: torch.nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """`target.load_state_dict(state)` for a state of whole tensors, where the target's may be sharded."""

    def part(value, parameter: torch.Tensor):
        """The value, sharded as the parameter is."""
        if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    if isinstance(target, torch.nn.Module):
        own = target.state_dict()
        target.load_state_dict({name: part(value, own[name]) for name, value in state.items()})
    else:
        target.load_state_dict(state)
        for parameter, values in target.state.items():
            target.state[parameter] = {name: part(value, parameter) for name, value in values.items()}


def from_all(value) -> list:
    """What each process has of this value, in the order of ranks; it is sent by pickle."""
    values = [None] * world()[1]
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


SUMMED, HIGHEST = ("tokens_per_s",), ("seconds", "verify_s", "peak_memory_mib")


def global_record(record: dict) -> dict:
    """One record of the records of all processes: means of floats, but for those above; sums of counts (integers)."""
    records, merged = from_all(record), {}
    if len(records) == 1:
        return record
    for name in dict.fromkeys(name for each in records for name in each):
        values = [each[name] for each in records if name in each]
        if name in HIGHEST or name in ("step", "skipped"):
            merged[name] = max(values)
        elif name in SUMMED or isinstance(values[0], int):
            merged[name] = sum(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Policy
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Policy:
    """A causal language model, its tokenizer and the tokens that end a response."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: list[int]

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_policy(name: str, task: Task, device: str = "auto", gradient_checkpointing: bool = False) -> Policy:
    """The policy: "tiny" (warm-started on `task`, cached) or a Hugging Face causal LM by hub id or folder.

    Weights are float32; on CUDA they are used under bfloat16 autocast. Dropout is off for good: the log-probs that
    training differentiates must be those of the distribution that was sampled from. Raises BadInput.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # ours say more
    folder = tiny_policy_folder(task) if name == "tiny" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"cannot load --model {name!r} on device {device!r}: {reason}") from error
    stop_ids = model.generation_config.eos_token_id if model.generation_config else None
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise BadInput(f"--model {name!r} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, tokenizer, sorted(stop_ids))
    check_head(policy, name)
    return policy


def check_head(policy: Policy, name: str) -> None:
    """Raise BadInput if the model does more between its last hidden state and its logits than `logits` knows of."""
    ids, model = torch.tensor([[policy.stop_ids[0], 0, 1]], device=policy.device), policy.model
    with torch.no_grad():
        hidden = getattr(model.base_model(ids), "last_hidden_state", None)
        same = hidden is not None and torch.allclose(logits(model, hidden), model(ids).logits, atol=1e-3, rtol=1e-3)
    if not same:
        raise BadInput(f"--model {name!r}: {type(model).__name__} computes its logits in a way that is not supported")


def logits(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits (..., V) float32 of last hidden states (..., H)."""
    scores = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return scores if cap is None else cap * torch.tanh(scores / cap)


def recompute_activations(model: torch.nn.Module, on: bool) -> None:
    """Turn gradient checkpointing on for a training pass or off for sampling, where it was enabled at load.

    Transformers ties it to training mode, and so to dropout: only the checkpointed modules change their mode, not the
    dropout modules in them.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA; float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def encode_prompts(policy: Policy, task: Task, problems: Sequence[Problem], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt: by the tokenizer's chat template if it has one, else by the task's plain template.

    Raises BadInput if a prompt and its response would not fit the model's context.
    """
    if policy.tokenizer.chat_template:
        turns = [[{"role": "user", "content": f"{p.prompt}\n\n{task.instruction}".strip()}] for p in problems]
        texts = policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts = policy.tokenizer(texts, add_special_tokens=False).input_ids  # the template has written them
    else:
        prompts = policy.tokenizer([task.template.replace("{prompt}", p.prompt) for p in problems]).input_ids
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    for problem, ids in zip(problems, prompts):
        if not ids:
            raise BadInput(f"the prompt {problem.prompt[:40]!r} has no tokens: remove this problem")
        if len(ids) + max_new_tokens > context:
            raise BadInput(
                f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed the model's context of "
                f"{context}: {problem.prompt[:40]!r} (shorten the response or remove this problem)"
            )
    return prompts


# The embedded policy. What is in TINY, in the task's problems and in its warm-start recipe decides the weights.
TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "initializer_range": 0.08,  # about 1/sqrt(hidden): with the usual 0.02 so narrow a model learns half as fast
}
TINY_SEED = 0


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; anything else is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


def tiny_policy_folder(task: Task) -> Path:
    """Where the warm-started `tiny` policy for this task lies, named by a hash of its recipe; see `cached`."""
    if task.warm_start is None:
        raise BadInput(f"--model tiny cannot learn task {task.name!r}: give a pretrained one by --model NAME_OR_FOLDER")
    recipe = [TINY, TINY_SEED, task.warm_start, [(problem.prompt, problem.solution) for problem in task.train]]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return cached(f"tiny-{task.name.replace('/', '-')}-{key}", lambda folder: save_policy(warm_start(task), folder))


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name under $XDG_CACHE_HOME (~/.cache); `write(folder)` fills it if it is not there yet.

    It is whole or absent, whenever the process dies. Two processes may race: both write, one wins.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-aware-rl"
    folder = cache / name
    if world()[0] > 0:  # the first process writes, the others wait
        dist.barrier()
    if folder.is_dir():
        if world()[0] == 0 and world()[1] > 1:
            dist.barrier()
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        write(Path(scratch) / name)
        try:
            os.rename(Path(scratch) / name, folder)
        except OSError:  # another process was first; its result is the same
            if not folder.is_dir():
                raise
    if world()[0] == 0 and world()[1] > 1:
        dist.barrier()
    return folder


def warm_start(task: Task) -> Policy:
    """A new tiny Llama, trained on `task`'s reference solutions; the same weights for the same recipe and threads."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            **TINY,
        )  # fmt: skip
        policy = Policy(LlamaForCausalLM(config), tokenizer, [tokenizer.eos_token_id])
    recipe, rng = task.warm_start, random.Random(TINY_SEED)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=recipe["steps"])
    bar = tqdm(range(recipe["steps"]), desc=f"warm-starting tiny on {task.name} (once)", unit="step")
    for _ in bar:
        problems = rng.choices(task.train, k=recipe["batch"])
        prompts = tokenizer([problem.prompt for problem in problems]).input_ids
        solutions = [with_slips(problem.solution, recipe.get("slips", 0.0), rng) for problem in problems]
        responses = tokenizer([solution + tokenizer.eos_token for solution in solutions]).input_ids
        ids, mask = padded(responses)
        loss = -response_log_probs(policy, prompts, ids, mask)[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    policy.model.eval()
    return policy


def with_slips(solution: str, rate: float, rng: random.Random) -> str:
    """The solution with each digit replaced by a random one with probability `rate`."""
    return "".join(rng.choice("0123456789") if c.isdigit() and rng.random() < rate else c for c in solution)


def save_policy(policy: Policy, folder: Path) -> None:
    """Write model and tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` loads them anywhere."""
    state = whole(policy.model.state_dict())
    if world()[0] == 0:
        policy.model.save_pretrained(folder, state_dict=state)
        policy.tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollouts:
    """n responses to each of B prompts, as token ids: nothing is ever decoded and tokenized again.

    prompts: B lists of token ids. ids: (B, n, T) int64. mask: (B, n, T) bool, true at the tokens of a response, its
    end token included, and false at the filler behind. log_probs: (B, n, T) float32, those of the distribution
    sampled from, 0 at filler.
    """

    prompts: list[list[int]]
    ids: torch.Tensor
    mask: torch.Tensor
    log_probs: torch.Tensor

    def first(self) -> "Rollouts":
        """The first response to each prompt only: (B, 1, T)."""
        return Rollouts(self.prompts, self.ids[:, :1], self.mask[:, :1], self.log_probs[:, :1])


def expert_rollouts(policy: Policy, task: Task, prompts: list[list[int]], responses: Sequence[str]) -> Rollouts:
    """Given responses as rollouts, one to each prompt, with an end token behind; log_probs 0: (B, 1, T).

    Raises BadInput if a prompt and its response do not fit the model's context.
    """
    space = " " if task.template.endswith(":") and not policy.tokenizer.chat_template else ""
    rows = policy.tokenizer([space + response for response in responses], add_special_tokens=False).input_ids
    end = policy.tokenizer.eos_token_id
    rows = [[*row, policy.stop_ids[0] if end is None else end] for row in rows]
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    for prompt, row, response in zip(prompts, rows, responses):
        if len(prompt) + len(row) > context:
            raise BadInput(
                f"a prompt and its expert response have {len(prompt) + len(row)} tokens, the model's context is "
                f"{context}: {response[:40]!r} (remove or shorten it)"
            )
    ids, mask = (x.unsqueeze(1).to(policy.device) for x in padded(rows))  # (B, T) -> (B, 1, T)
    return Rollouts(prompts, ids, mask, torch.zeros(ids.shape, device=policy.device))


def joined(first: Rollouts, second: Rollouts) -> Rollouts:
    """The responses of both to the same prompts: (B, n1, T1) and (B, n2, T2) -> (B, n1 + n2, T), T the longer."""
    T = max(first.ids.shape[-1], second.ids.shape[-1])
    tensors = (
        torch.cat([F.pad(x, (0, T - x.shape[-1])) for x in pair], 1)
        for pair in ((first.ids, second.ids), (first.mask, second.mask), (first.log_probs, second.log_probs))
    )
    return Rollouts(first.prompts, *tensors)


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one (R, L) int64 tensor, filled with 0, and its (R, L) bool mask of real tokens."""
    length = torch.tensor([len(row) for row in rows]).unsqueeze(-1)
    column = torch.arange(int(length.max()))
    mask = column >= column.numel() - length if left else column < length
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.tensor([i for row in rows for i in row])
    return ids, mask


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, written in place into room for half as many again. DynamicLayer copies all of them for
    every token."""

    room: tuple[torch.Tensor, torch.Tensor] | None = None  # each (R, heads, L, D), of which `keys` are the beginning

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, start = (key_states, value_states), self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.room = tuple(x.new_empty(*x.shape[:2], end + end // 2, x.shape[-1]) for x in new)
            if start:
                for room, old in zip(self.room, (self.keys, self.values)):
                    room[:, :, :start] = old
        for room, x in zip(self.room, new):
            room[:, :, start:end] = x
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # copies the rows that stay: the room is a new one
        self.room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None


@contextlib.contextmanager
def grouped_queries() -> Iterator[None]:
    """Inside, the query heads of one new token that share keys and values read these as they are (grouped-query
    attention). Elsewhere `sdpa` in transformers, given a mask, copies them for every query head."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, mask, dropout=0.0, scaling=None, position_bias=None, **others):
        (R, heads, new, D), groups = query.shape, key.shape[1]
        if new > 1 or heads == groups or position_bias is not None:
            return sdpa(module, query, key, value, mask, dropout, scaling, position_bias=position_bias, **others)
        query = query.reshape(R, groups, heads // groups, D)  # those of a group take the place of new tokens
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return output.reshape(R, 1, heads, D), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # of ours: the library's own is behind it


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """n responses to each prompt by pure temperature sampling, each up to and including its end token.

    Every prompt is read once and its keys and values are shared out to its n samples. Finished rows leave the batch
    when half of it is done. Prompts may differ in length. Runs on the policy's device and returns there.
    """
    model, device, R = policy.model, policy.device, len(prompts) * n
    recompute_activations(model, False)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    ids = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    mask = torch.zeros(R, max_new_tokens, dtype=torch.bool, device=device)
    log_probs = torch.zeros(R, max_new_tokens, device=device)
    with autocast(device), gathered(model), grouped_queries():
        prompt_ids, prompt_mask = (x.to(device) for x in padded(prompts, left=True))  # (B, P)
        cache = DynamicCache(config=model.config)
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        position = prompt_mask.cumsum(-1) - 1  # (B, P)
        hidden = model.base_model(
            input_ids=prompt_ids, attention_mask=prompt_mask.long(), position_ids=position.clamp(min=0),
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        cache.batch_repeat_interleave(n)
        scores = logits(model, hidden).repeat_interleave(n, 0)  # (B, V) -> (R, V)
        seen = prompt_mask.long().repeat_interleave(n, 0)  # (R, P): the attention mask
        position = position[:, -1:].repeat_interleave(n, 0)  # (R, 1)
        rows = torch.arange(R, device=device)  # the rows of the output that are still in the batch
        alive = torch.ones(R, dtype=torch.bool, device=device)  # among these
        for t in range(max_new_tokens):
            log_p = (scores / temperature).log_softmax(-1)
            token = torch.multinomial(log_p.exp(), 1, generator=generator)  # (R, 1)
            live = rows[alive]
            ids[live, t] = token[alive, 0]
            mask[live, t] = True
            log_probs[live, t] = log_p.gather(-1, token)[alive, 0]
            alive &= ~torch.isin(token[:, 0], stop_ids)
            running = int(alive.sum())
            if running == 0 or t == max_new_tokens - 1:
                break
            if running <= len(rows) // 2:
                cache.batch_select_indices(alive.nonzero()[:, 0])
                rows, token, seen, position = rows[alive], token[alive], seen[alive], position[alive]
                alive = alive[alive]
            seen, position = F.pad(seen, (0, 1), value=1), position + 1
            hidden = model.base_model(
                input_ids=token, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            scores = logits(model, hidden)
    T = int(mask.any(0).sum())
    return Rollouts(prompts, *(x[:, :T].unflatten(0, (len(prompts), n)) for x in (ids, mask, log_probs)))


def decode(policy: Policy, rollouts: Rollouts) -> list[list[str]]:
    """The responses as text, special tokens left out: B lists of n strings, for the verifier."""
    ids, length = rollouts.ids.flatten(0, 1).tolist(), rollouts.mask.sum(-1).flatten().tolist()
    texts = policy.tokenizer.batch_decode([row[:end] for row, end in zip(ids, length)], skip_special_tokens=True)
    n = rollouts.ids.shape[1]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


# ---------------------------------------------------------------------------------------------------------------------
# Training step
# ---------------------------------------------------------------------------------------------------------------------

LOGITS_PER_CHUNK = 2**25  # float32 logits held at once: 128 MiB, whatever the vocabulary


def response_log_probs(
    policy: Policy, prompts: Sequence[Sequence[int]], ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(token | prompt, earlier tokens) of each response token; (R, T) float32, 0 where mask is false.

    prompts: R lists of ids. ids, mask: (R, T), as in `Rollouts`. Differentiable. The output layer is applied to the
    response positions only, a chunk at a time, and again in the backward pass: no (R, T, V) tensor ever exists.
    """
    model, device = policy.model, policy.device
    recompute_activations(model, torch.is_grad_enabled())
    ids, mask = ids.to(device), mask.to(device)

    def token_log_probs(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = logits(model, hidden)
        scores = scores if temperature == 1 else scores / temperature  # a copy of all logits less
        return -F.cross_entropy(scores, targets, reduction="none")

    def log_probs() -> torch.Tensor:
        hidden = response_states(model, prompts, ids, mask)[mask]  # (R, T, H) -> (M, H)
        size = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
        chunks = zip(hidden.split(size), ids[mask].split(size))
        values = torch.cat([checkpoint(token_log_probs, h, y, use_reentrant=False) for h, y in chunks])  # (M,)
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, values)

    with autocast(device):
        return in_forward(model, log_probs)


def response_states(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The last hidden state that predicts each response token: (R, T, H), of any value where mask (R, T) is false.

    Rows with the same prompt share one pass over it, as in `sample`, unless activations are to be recomputed, which
    rules out a cache of keys and values, or the model is sharded, when all processes must run its layers in the same
    order, or it would save less than a tenth of the tokens.
    """
    device = ids.device
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    saved = sum(map(len, prompts)) - sum(map(len, place))
    if recomputed or sharded(model) or 10 * saved < sum(map(len, prompts)) + int(mask.sum()):
        # Filler stands on the right, where causal attention never looks: no mask, the fast attention kernels apply.
        # The last token of a response predicts nothing and is left out.
        rows = [[*prompt, *row[keep][:-1].tolist()] for prompt, row, keep in zip(prompts, ids.cpu(), mask.cpu())]
        hidden = model.base_model(input_ids=padded(rows)[0].to(device), use_cache=False).last_hidden_state  # (R, L, H)
        length = torch.tensor([len(prompt) for prompt in prompts], device=device).unsqueeze(-1)  # (R, 1)
        before = (length - 1 + torch.arange(ids.shape[1], device=device)).clamp(max=hidden.shape[1] - 1)  # (R, T)
        return hidden[torch.arange(len(rows), device=device).unsqueeze(-1), before]
    group = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (R,)
    prompt_ids, seen = (x.to(device) for x in padded(list(place), left=True))  # (G, P)
    position, cache = seen.cumsum(-1) - 1, DynamicCache(config=model.config)
    first = model.base_model(
        input_ids=prompt_ids, attention_mask=seen.long(), position_ids=position.clamp(min=0),
        past_key_values=cache, use_cache=True,
    ).last_hidden_state[group, -1:]  # fmt: skip
    if ids.shape[1] == 1:
        return first
    cache.batch_select_indices(group)
    rest = model.base_model(
        input_ids=ids[:, :-1], attention_mask=F.pad(seen.long()[group], (0, ids.shape[1] - 1), value=1),
        position_ids=position[group, -1:] + torch.arange(1, ids.shape[1], device=device),
        past_key_values=cache, use_cache=True,
    ).last_hidden_state  # fmt: skip
    return torch.cat([first, rest], 1)


def micro_batches(lengths: torch.Tensor, budget: int) -> Iterator[torch.Tensor]:
    """Indices of rows, longest first, in groups whose padded size (rows times longest row) is at most `budget` tokens.

    A row longer than the budget is a group of its own. lengths: (R,) int64.
    """
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        rows = max(1, budget // int(lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def accumulate_gradient(
    policy: Policy, rollouts: Rollouts, advantages: torch.Tensor, temperature: float, budget: int, clip: float | None
) -> float:
    """Add the gradient of the policy-gradient loss to the parameters' .grad; returns the loss.

        loss = -(1/B) sum_b sum_i A_bi log pi(y_bi)        a sum over a prompt's samples, a mean over prompts

    clip: None, or PPO's epsilon: log pi(y) is then replaced, token by token, by the clipped ratio to the log-probs that
    the rollouts were sampled with; the gradients are the same where the ratio is 1. advantages: (B, n).
    Rows whose advantage is zero are left out: the gradient is the same and their cost is gone.
    """
    B, n, _ = rollouts.ids.shape
    ids, mask, old = rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1), rollouts.log_probs.flatten(0, 1)
    advantages = advantages.flatten().to(policy.device, torch.float32)  # (B*n,)
    signal = advantages.nonzero()[:, 0].cpu()
    lengths = torch.tensor([len(prompt) for prompt in rollouts.prompts]).repeat_interleave(n) + mask.sum(-1).cpu()
    total, batches = 0.0, [(signal[batch], 1) for batch in micro_batches(lengths[signal], budget)]
    if sharded(policy.model):  # every pass is the work of all processes: who has fewer joins in with a row that is 0
        batches += [(torch.tensor([0]), 0)] * (max(from_all(len(batches))) - len(batches))
    for rows, weight in batches:
        T = int(mask[rows].sum(-1).max())
        prompts = [rollouts.prompts[row // n] for row in rows.tolist()]
        log_p = response_log_probs(policy, prompts, ids[rows, :T], mask[rows, :T], temperature)  # (R, T)
        A = weight * advantages[rows].unsqueeze(-1)  # (R, 1)
        if clip is None:
            objective = A * log_p
        else:
            ratio = (log_p - old[rows, :T]).exp()
            objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) * mask[rows, :T]
        loss = -objective.sum() / B
        loss.backward()
        total += loss.item()
    return total


def policy_gradient_step(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: torch.Tensor, args
) -> dict[str, float]:
    """`args.epochs` optimiser steps on the same rollouts, PPO-clipped if there are several (Tang).

    advantages: (B, n), sum convention. args: temperature, micro_batch_tokens, epochs, clip, max_grad_norm.
    Returns the metrics of the last step: loss, grad_norm, signal (the share of rows with an advantage), and skipped: 1
    if the gradient was not finite and the policy stayed as it was. When memory runs out
    args.micro_batch_tokens is halved and the step begun again. Raises BadInput when it cannot be halved further.
    """
    skipped = 0
    for _ in range(epochs := getattr(args, "epochs", 1)):
        clip = args.clip if epochs > 1 else None
        while True:
            # Zeros, not None: a step without any signal is still a step of the optimiser, also right after a resume.
            for parameter in policy.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            try:
                loss = accumulate_gradient(
                    policy, rollouts, advantages, args.temperature, args.micro_batch_tokens, clip
                )
                break
            except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU it is a plain one
                if not (isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)):
                    raise
                if sharded(policy.model):  # the other processes wait for this one's part of the same micro-batch
                    raise BadInput("out of memory: lower --micro-batch-tokens, and --resume the run") from error
                if args.micro_batch_tokens <= max(map(len, rollouts.prompts)) + rollouts.ids.shape[-1]:
                    raise BadInput("out of memory with one response at a time: use a smaller model, shorter responses "
                                   "(--max-new-tokens) or --gradient-checkpointing") from error  # fmt: skip
            args.micro_batch_tokens //= 2
            tqdm.write(f"out of memory: going on with --micro-batch-tokens {args.micro_batch_tokens}")
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()
        average_gradients(policy.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), args.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm.isfinite():
            optimizer.step()
        else:
            skipped = 1
    signal = (advantages != 0).float().mean().item()
    return {"loss": loss, "grad_norm": norm.item(), "signal": signal, "skipped": skipped}


@torch.no_grad()
def log_ratios(policy: Policy, reference: Policy, rollouts: Rollouts, args) -> torch.Tensor:
    """log pi(token) - log pi_ref(token) of each response token, (B, n, T) on the CPU, 0 at filler.

    Pi's log-probs are those of sampling; the sum over T is a response's log ratio. args: temperature,
    micro_batch_tokens.
    """
    B, n, _ = rollouts.ids.shape
    ids, mask = rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1)
    lengths = torch.tensor([len(prompt) for prompt in rollouts.prompts]).repeat_interleave(n) + mask.sum(-1).cpu()
    ratios = rollouts.log_probs.flatten(0, 1).cpu().clone()  # (B*n, T)
    with gathered(reference.model):
        for rows in micro_batches(lengths, args.micro_batch_tokens):
            prompts = [rollouts.prompts[row // n] for row in rows.tolist()]
            ratios[rows] -= response_log_probs(reference, prompts, ids[rows], mask[rows], args.temperature).cpu()
    return ratios.unflatten(0, (B, n))


def kl_advantages(ratios: torch.Tensor) -> torch.Tensor:
    """Advantages of the objective -KL(pi || pi_ref), to be added to a reward's with a coefficient. (B, n), n >= 2.

    ratios: (B, n, T) from `log_ratios`. KL is a mean-type objective with reward -log(pi(y) / pi_ref(y)) a sample,
    so it has its own leave-one-out baseline and never passes through max or a vote. Tang trains J_k - beta KL.
    """
    return leave_one_out(lambda reward: reward.mean(-1), -ratios.sum(-1))


def kl_estimate(ratios: torch.Tensor) -> float:
    """KL(pi || pi_ref) in nats a response, from (B, n, T) log ratios of tokens: E[1/w - 1 + log w] summed over tokens.

    Unbiased, and never negative, unlike the mean of log w (Schulman's k3).
    """
    return ((-ratios).exp() - 1 + ratios).sum(-1).mean().item()


@torch.no_grad()
def move_towards(anchor: Policy, policy: Policy, rate: float) -> None:
    """One step of an exponential moving average: anchor <- (1 - rate) anchor + rate policy, in place."""
    for average, parameter in zip(anchor.model.parameters(), policy.model.parameters(), strict=True):
        average.lerp_(parameter, rate)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: arguments, batches, evaluation, run folder, table and figure
# ---------------------------------------------------------------------------------------------------------------------


def run_cli(main: Callable, Args: type, presets: dict[str, dict] = {}) -> None:
    """Parse the command line into Args, run main(args); the user's mistakes end in one line and exit code 2.

    presets: for a script with --preset, the defaults that each one changes, by name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--resume")
    known = parser.parse_known_args()[0]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        saved = arguments_of(known.resume) if known.resume else presets.get(known.preset, {})
        args = tyro.cli(Args, default=Args(**saved), description=sys.modules[main.__module__].__doc__)
        if known.resume:
            changed = [f"--{name.replace('_', '-')}" for name in saved if getattr(args, name) != saved[name]]
            if changed := [name for name in changed if name != "--resume"]:
                raise BadInput(
                    f"{known.resume} has other arguments, and a run keeps its own: leave out {', '.join(changed)}"
                )
        main(args)
    except (BadInput, OSError) as error:  # OSError: a full disk, a folder that cannot be written to
        print(f"error: {error}" if world()[0] == 0 else f"error in rank {world()[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:  # where all end together, or are stopped together; where one fails the others may be waiting for it
        ended = sys.exc_info()[1]
        if dist.is_initialized() and (ended is None or isinstance(ended, SystemExit) and not ended.code):
            dist.destroy_process_group()


def arguments_of(folder: str) -> dict:
    """The arguments of the run in this folder. Raises BadInput if it is none, or one of another script."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is not a run folder: {error}") from error
    script = saved.pop("script")
    if script != Path(sys.argv[0]).stem:
        raise BadInput(f"{folder} is a run of {script}.py: resume it by that")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}


def check_args(args) -> None:
    """Raise BadInput for a value out of range among the arguments that all scripts share."""
    k = "k" if hasattr(args, "k") else "N"
    at_least = {k: 1, "steps": 0, "prompts_per_step": 1, "eval_every": 0, "eval_problems": 1, "epochs": 1}
    at_least |= {"save_every": 1, "show_samples": 0}
    at_least |= {"kl_coef_end": 0, "kl_delay": 0, "kl_anneal_steps": 0, "warm_up_steps": 0, "verifier_problems": 1}
    at_least |= {"micro_batch_tokens": 1, "kl_coef": 0, "n": getattr(args, k), "eval_n": getattr(args, k)}
    for name, least in at_least.items():
        if getattr(args, name, least) < least:
            why = f" (--{k} {least} takes that many samples)" if name in ("n", "eval_n") else ""
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}{why}, not {getattr(args, name)}")
    for name in ("lr", "temperature", "max_grad_norm", "clip", "value_lr", "verifier_lr"):
        if not 0 < getattr(args, name, 1) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} must be a positive number, not {getattr(args, name)}")
    if args.prompts_per_step % world()[1]:
        raise BadInput(
            f"--prompts-per-step must be a multiple of the {world()[1]} processes, not {args.prompts_per_step}"
        )
    if args.fsdp and not dist.is_initialized():
        raise BadInput("--fsdp spreads the policy over processes: start them by torchrun --nproc-per-node N -- ...")
    if args.run_name is not None and not re.fullmatch(r"[\w.=+-]*[\w=+-]", args.run_name):
        raise BadInput(f"--run-name must be a plain folder name, not {args.run_name!r}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if getattr(args, "kl_coef", 0) > 0 and args.n < 2:
        raise BadInput("--kl-coef needs --n 2 or more: the KL's baseline is the other samples")


def problems_at(problems: Sequence[Problem], levels: Sequence[int], what: str) -> Sequence[Problem]:
    """The problems of these levels (all, if none are named). Raises BadInput if there are none."""
    if not problems:
        raise BadInput(f"the task has no {what} problems here (--steps 0 only evaluates, on held-out ones)")
    chosen = [problem for problem in problems if problem.level in levels] if levels else problems
    if not chosen:
        there = sorted({problem.level for problem in problems if problem.level is not None})
        have = f"the task has levels {there}" if there else f"the task has {len(problems)} problems without a level"
        raise BadInput(f"no {what} problems at --levels {' '.join(map(str, levels)) or '(all)'}: {have}")
    return chosen


def evaluation_problems(problems: Sequence[Problem], per_level: int) -> list[Problem]:
    """At most per_level problems of each level, drawn once and for all: the same whatever the seed of the run."""
    levels = sorted({problem.level for problem in problems}, key=lambda level: (level is None, level))
    pools = [[problem for problem in problems if problem.level == level] for level in levels]
    return [problem for pool in pools for problem in random.Random(0).sample(pool, min(per_level, len(pool)))]


@functools.lru_cache(maxsize=2)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """0..size-1 in the order of this pass over the data."""
    return random.Random(f"{seed}/{epoch}").sample(range(size), size)


def training_batch(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The step-th batch: every problem once a pass, each pass in a new order. A function of its arguments alone."""
    places = (divmod(i, len(problems)) for i in range(step * size, (step + 1) * size))
    return [problems[shuffled(len(problems), seed, epoch)[i]] for epoch, i in places]


def step_generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The random numbers of a step: a function of seed, step and rank, so that evaluating more often changes
    nothing."""
    rank = world()[0]
    number = (seed << 32) + step if rank == 0 else random.Random(f"{seed}/{step}/{rank}").getrandbits(63)
    return torch.Generator(device).manual_seed(number)


def judged(task: Task, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
    """The task's verdict, with the seconds it took. A verifier that raises costs the samples that make it raise, which
    get reward 0 and no vote and are counted as verifier_errors, never the run."""
    start = time.perf_counter()
    try:
        verdict = task.verify(problems, responses)
    except Exception as error:  # the verifier's own code, or a model's response that it did not foresee
        if len(problems) == 1 and len(responses[0]) == 1:
            tqdm.write(f"the verifier of {task.name} raised {type(error).__name__}: {str(error)[:200]!r}")
            verdict = Verdict(torch.zeros(1, 1), torch.full((1, 1), -1), {"verifier_errors": 1}, torch.zeros(1, 1))
        else:  # halve until those to blame are alone
            dim = 0 if len(problems) > 1 else 1
            half = max(len(problems), len(responses[0])) // 2
            if dim == 0:
                parts = [(problems[:half], responses[:half]), (problems[half:], responses[half:])]
            else:
                parts = [(problems, [responses[0][:half]]), (problems, [responses[0][half:]])]
            verdict = concatenated([judged(task, *part) for part in parts], dim)
    verdict.seconds = time.perf_counter() - start
    return verdict


def concatenated(verdicts: Sequence[Verdict], dim: int = 0) -> Verdict:
    """Verdicts one after the other, along problems (dim 0) or samples (dim 1), their counts and seconds added up."""
    rewards, votes, scores = (torch.cat([getattr(v, x) for v in verdicts], dim) for x in ("rewards", "votes", "scores"))
    counts = dict(sum((Counter(v.counts) for v in verdicts), Counter()))
    return Verdict(rewards, votes, counts, scores, sum(v.seconds for v in verdicts))


def rollout_metrics(policy: Policy, rollouts: Rollouts, verdict: Verdict, advantages: torch.Tensor) -> dict[str, float]:
    """What a step's rollouts (B, n) look like: the metrics that all scripts log, see README."""
    length = rollouts.mask.sum(-1)  # (B, n)
    last = rollouts.ids.gather(-1, (length - 1).unsqueeze(-1)).squeeze(-1)  # (B, n)
    no_end = ~torch.isin(last, torch.tensor(policy.stop_ids, device=last.device))
    return {
        "reward": verdict.rewards.mean().item(),
        "entropy": -(rollouts.log_probs.sum() / length.sum()).item(),
        "length": length.float().mean().item(),
        "no_end": no_end.float().mean().item(),
        "no_answer": (verdict.votes < 0).float().mean().item(),
        "no_signal": (advantages == 0).all(-1).float().mean().item(),
    }


def step_timings(policy: Policy, rollouts: Rollouts, verdict: Verdict, start: float) -> dict[str, float]:
    """Of a step that began at `start` (time.perf_counter): seconds, those in the verifier, sampled tokens per second,
    and the process's peak memory so far in MiB (the GPU's, on a GPU)."""
    seconds = time.perf_counter() - start
    if policy.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(policy.device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    tokens = rollouts.mask.sum().item() / seconds
    return {"seconds": seconds, "verify_s": verdict.seconds, "tokens_per_s": tokens, "peak_memory_mib": peak}


def show_samples(problems: Sequence[Problem], responses: Sequence[Sequence[str]], verdict: Verdict, count: int) -> None:
    """Print the first response to each of `count` problems, evenly spaced, with its reward; all text is escaped: a
    model's must not drive the terminal."""
    count = min(count, len(problems))
    for i in (place * len(problems) // count for place in range(count)):
        reward, response = verdict.rewards[i, 0].item(), responses[i][0]
        tqdm.write(f"{reward:g}  {ascii(problems[i].prompt[-200:])} -> {ascii(response[:1000])}")


def evaluate(
    policy: Policy, task: Task, problems: Sequence[Problem], args, temperature: float | None = None
) -> Verdict:
    """Rewards, votes and scores (P, eval_n) of fresh samples for each problem, always drawn with the same random
    numbers, and the verifier's events over all of them. Prints some, with their rewards.

    args: eval_n, max_new_tokens, temperature (that of training, unless another is given), show_samples.
    """
    temperature = temperature or args.temperature
    rank, processes = world()
    generator = torch.Generator(policy.device).manual_seed(rank)
    size = max(1, 4096 // args.eval_n)  # problems at a time
    verdicts, first, mine = [], [], share(problems)
    with gathered(policy.model):  # the processes may differ in how often they sample
        for i in tqdm(range(0, len(mine), size), desc="evaluating", leave=False, disable=True if rank else None):
            part = mine[i : i + size]
            prompts = encode_prompts(policy, task, part, args.max_new_tokens)
            rollouts = sample(policy, prompts, args.eval_n, args.max_new_tokens, temperature, generator)
            responses = decode(policy, rollouts)
            verdicts.append(judged(task, part, responses))
            first += [row[:1] for row in responses]
    if rank == 0:
        show_samples(mine, first, concatenated(verdicts), args.show_samples)
    verdict = concatenated([v for part in from_all(verdicts) for v in part])
    # From the order of ranks back to that of the problems.
    order = torch.tensor([i for r in range(processes) for i in range(r, len(problems), processes)]).argsort()
    return dataclasses.replace(
        verdict, rewards=verdict.rewards[order], votes=verdict.votes[order], scores=verdict.scores[order]
    )


def load_learned_verifier(task: Task, policy: Policy, problems: Sequence[Problem], args) -> learned.LearnedVerifier:
    """The verifier of --verifier learned: --verifier-model, or one trained here on the initial policy's own labelled
    samples (once for `tiny`, in the cache). Prints its quality on samples for `problems`, held out.

    args: model, verifier_model, verifier_problems, verifier_lr, max_new_tokens, resume (a run keeps its verifier).
    """

    def labelled_samples(problems: Sequence[Problem]):
        """The problems, 8 responses to each, and their rewards."""
        prompts = encode_prompts(policy, task, problems, args.max_new_tokens)
        generator = torch.Generator(policy.device).manual_seed(1)
        responses = decode(policy, sample(policy, prompts, 8, args.max_new_tokens, 1.0, generator))
        return problems, responses, judged(task, problems, responses).rewards

    def trained() -> learned.LearnedVerifier:
        chosen = training_batch(task.train, 0, min(args.verifier_problems, len(task.train)), seed=0)
        base = policy.model.name_or_path
        return learned.trained_verifier(base, task, *labelled_samples(chosen), policy.device, args.verifier_lr)

    own = Path(args.resume) / "verifier" if args.resume else None
    if args.verifier_model or (own and own.is_dir()):
        verifier = learned.load_verifier(args.verifier_model or str(own), task, policy.device)
    elif args.model == "tiny":
        recipe = f"lr{args.verifier_lr:g}-p{args.verifier_problems}-t{args.max_new_tokens}"
        folder = cached(f"{Path(policy.model.name_or_path).name}-verifier-{recipe}", lambda x: trained().save(x))
        verifier = learned.load_verifier(str(folder), task, policy.device)
    else:
        verifier = trained()
    _, responses, rewards = labelled_samples(problems)
    print(learned.quality(verifier.score([problem.prompt for problem in problems], responses), rewards))
    return verifier


def powers_of_two(n: int, *others: int) -> list[int]:
    """1, 2, 4, ... up to n, with the others: the sizes at which metrics are shown."""
    return sorted({2**i for i in range(n.bit_length())} | set(others))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of per-problem values (P,) and its standard error over problems (nan for one problem)."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def by_level(
    metrics: dict[str, torch.Tensor], problems: Sequence[Problem]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard error of each metric (P,) over all problems ("all") and over each level's ("1", "2", ...)."""
    levels = sorted({problem.level for problem in problems if problem.level is not None})
    groups = {"all": torch.arange(len(problems))}
    groups |= {str(x): torch.tensor([i for i, p in enumerate(problems) if p.level == x]) for x in levels}
    return {
        level: {name: mean_and_error(values[rows]) for name, values in metrics.items()}
        for level, rows in groups.items()
    }


def new_run_folder(args, parts: Sequence) -> Path:
    """Create runs/<name>/ with args.json and return it; for the first process alone. The name: --run-name, or the
    script, `parts` and a hash of all arguments; a number is appended where it is taken, so that no run overwrites
    another's."""
    arguments = dataclasses.asdict(args)
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:6]
    script = Path(sys.argv[0]).stem
    name = args.run_name or "-".join(str(part).strip("/").replace("/", "_") for part in (script, *parts, digest))
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"cannot create the run folder {folder}: {error.strerror}") from error
    (folder / "args.json").write_text(json.dumps({"script": script, **arguments}, indent=2))
    return folder


class Run:
    """A run: its folder under runs/, its logs, its steps and its checkpoints.

    folder: args.json; metrics.jsonl, a line a step and a line an evaluation, the same for the same arguments (on the
    CPU bit for bit, however often the run was stopped or killed); timings.jsonl, what depends on the machine;
    checkpoints/. state: what training changes, by name: modules and optimizers. All else is a function of arguments and
    step, the random numbers and the order of the data included. progress: plain values and tensors that are saved
    beside the state.
    """

    def __init__(self, args, parts: Sequence, **state):
        """A new run in a new folder, or with args.resume that run at its last checkpoint. args: resume, save_every,
        steps, tensorboard. Raises BadInput."""
        self.args, self.state, self.stopping = args, state, False
        self.progress = {"step": 0, "history": [], "rewards": [], "skipped_in_a_row": 0}
        self.bar, self.writer = tqdm(disable=True), None
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise BadInput("--tensorboard needs that library: pip install tensorboard") from error
        self.folder = Path(args.resume) if args.resume else new_run_folder(args, parts) if world()[0] == 0 else None
        self.folder = from_all(self.folder)[0]
        if args.tensorboard and world()[0] == 0:
            self.writer = SummaryWriter(self.folder)
        if args.resume:
            self.restore()
        print(
            f"{'resuming at step ' + str(self.progress['step']) + ' in' if args.resume else 'writing to'} {self.folder}"
        )

    def steps(self, description: str) -> Iterator[int]:
        """1, 2, ... args.steps, less those done before: a progress bar, a checkpoint every args.save_every steps and at
        the end. On SIGINT or SIGTERM the step is finished and saved, and the script ends; at a second one it ends at
        once."""
        first, last = self.progress["step"] + 1, self.args.steps
        self.bar = tqdm(
            total=last, initial=first - 1, desc=description, unit="step", disable=first > last or world()[0] > 0
        )
        handlers = {number: signal.signal(number, self.request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(first, last + 1):
                yield step
                self.bar.update()
                self.progress["step"] = step
                self.stopping = any(from_all(self.stopping))  # all stop after the same step
                if step == last or step % self.args.save_every == 0 or self.stopping:
                    self.save()
                if self.stopping and step < last:
                    self.bar.close()
                    print(f"stopped after step {step}; to go on: python {sys.argv[0]} --resume {self.folder}")
                    sys.exit(0)
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def request_stop(self, number: int, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        tqdm.write("stopping when this step is done (again: at once, losing it)")

    def log(self, record: dict, timings: dict | None = None, shown: Sequence[str] = ()) -> None:
        """Append a line to metrics.jsonl, and one to timings.jsonl; the names in `shown` go to the progress bar.

        Raises BadInput when ten steps in a row were skipped because their gradients were not finite.
        """
        if "loss" in record:
            record, timings = global_record(record), global_record(timings)
        if "reward" in record:
            self.progress["rewards"].append(record["reward"])
        if world()[0] == 0:
            append_json(self.folder / "metrics.jsonl", record)
            if timings:
                append_json(self.folder / "timings.jsonl", {"step": record["step"], **timings})
        if shown:
            values = {**record, **(timings or {})}
            self.bar.set_postfix({name: f"{values[name]:.3g}" for name in shown}, refresh=False)
        if self.writer:
            scalars = {f"eval/{name}": mean for name, (mean, _) in record.get("eval", {"all": {}})["all"].items()}
            for name, value in {**record, **(timings or {}), **scalars}.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()
        if "skipped" in record:
            self.progress["skipped_in_a_row"] = (self.progress["skipped_in_a_row"] + 1) * record["skipped"]
            if self.progress["skipped_in_a_row"] == 10:
                raise BadInput(
                    "ten steps in a row had a loss or gradient that is not finite, and were skipped: lower --lr, raise "
                    f"--temperature if it is below 1, or look at the weights of --model {self.args.model!r}"
                )

    def save(self) -> None:
        """Write a checkpoint: whole under its final name, which has a hash of it, or not at all; the last two stay.

        Raises BadInput if it cannot be written; those before it are as they were.
        """
        folder = self.folder / "checkpoints"
        unfinished = folder / "unfinished"
        states = {name: whole(x.state_dict()) for name, x in self.state.items()}
        if world()[0] > 0:
            return
        try:
            sizes = {}
            for name in ("metrics.jsonl", "timings.jsonl"):
                with open(self.folder / name, "a") as file:
                    os.fsync(file.fileno())
                    sizes[name] = file.tell()
            folder.mkdir(exist_ok=True)
            with open(unfinished, "wb") as file:
                torch.save({"progress": {**self.progress, "sizes": sizes}, "state": states}, file)
                file.flush()
                os.fsync(file.fileno())
            name = f"{self.progress['step']:08d}-{file_hash(unfinished)}.pt"
            os.replace(unfinished, folder / name)
            directory = os.open(folder, os.O_RDONLY)
            os.fsync(directory), os.close(directory)
            for old in sorted(folder.glob("*.pt"))[:-2]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch says that a file cannot be written
            unfinished.unlink(missing_ok=True)
            why = str(error).partition("\n")[0]
            raise BadInput(f"cannot write a checkpoint of step {self.progress['step']} to {folder}: {why}") from error

    def restore(self) -> None:
        """Load the last checkpoint that is whole, and cut the logs back to it."""
        path = from_all(last_checkpoint(self.folder) if world()[0] == 0 else None)[0]
        if path is not None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            self.progress = checkpoint["progress"]
            for name, x in self.state.items():
                load_whole(x, checkpoint["state"][name])
        for name in ("metrics.jsonl", "timings.jsonl"):
            if (self.folder / name).exists() and world()[0] == 0:
                os.truncate(self.folder / name, self.progress.get("sizes", {}).get(name, 0))


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that is whole; those behind it, which are not, are removed."""
    for path in sorted((folder / "checkpoints").glob("*.pt"), reverse=True):
        if file_hash(path) == path.stem.partition("-")[2]:
            return path
        print(f"{path} is torn and was removed: using the one before it")
        path.unlink()
    return None


def append_json(path: Path, record: dict) -> None:
    """Append one JSON line; what is not a finite number becomes null, for which alone JSON has a word."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with open(path, "a") as file:
        file.write(json.dumps(finite) + "\n")


def file_hash(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def comparison_table(before: dict, after: dict | None, problems: Sequence[Problem], columns: Sequence[str]) -> str:
    """Per-problem metrics, name -> (P,), by level: before -> after with the paired change and its standard error.

    Without `after`: before alone, with its standard error.
    """
    start = by_level(before, problems)
    if after is not None:
        end = by_level(after, problems)
        change = by_level({name: after[name] - before[name] for name in columns}, problems)
    lines = [f"{'level':>5}  " + "  ".join(f"{name:^32}" for name in columns)]
    for level in start:
        cells = []
        for name in columns:
            mean, error = start[level][name]
            if after is None:
                cells.append(f"{mean:.3f} ± {error:.3f}")
            else:
                (now, _), (difference, error) = end[level][name], change[level][name]
                cells.append(f"{mean:.3f} -> {now:.3f} ({difference:+.3f} ± {error:.3f})")
        lines.append(f"{level:>5}  " + "  ".join(f"{cell:^32}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def save_figure(
    folder: Path, evaluations: list[tuple[int, dict]], rewards: list[float], names: list[str], k: int
) -> None:
    """curves.png: each metric family against j before and after, by level at k, and along training.

    evaluations: (step, result of `by_level`), first and last the ones before and after. rewards: mean reward by step.
    names: metric families, such as "pass" for pass@1, pass@2, ...
    """
    if world()[0] > 0:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (_, before), (_, after) = evaluations[0], evaluations[-1]
    panels = {"when": [("before", "tab:gray"), ("after", "tab:blue")], "result": [before, after]}
    figure, axes = plt.subplots(1, len(names) + 2, figsize=(4.2 * (len(names) + 2), 3.6), layout="constrained")
    for axis, name in zip(axes, names):
        for (label, colour), result in zip(panels["when"], panels["result"]):
            js = [int(key.partition("@")[2]) for key in result["all"] if key.startswith(f"{name}@")]
            mean, error = (np.array([result["all"][f"{name}@{j}"][i] for j in js]) for i in (0, 1))
            axis.plot(js, mean, marker="o", markersize=3, color=colour, label=label)
            axis.fill_between(js, mean - error, mean + error, color=colour, alpha=0.2)
        axis.set(xscale="log", xlabel="j", ylabel=f"{name}@j", title=f"{name}@j, held out (± standard error)")
        axis.set_xticks(js, map(str, js))
        axis.minorticks_off()
        axis.legend()
    key = f"{names[-1]}@{k}"
    levels = [level for level in before if level != "all"] or ["all"]
    for offset, ((label, colour), result) in zip((-0.2, 0.2), zip(panels["when"], panels["result"])):
        mean, error = zip(*(result[level][key] for level in levels))
        axes[-2].bar(np.arange(len(levels)) + offset, mean, 0.4, yerr=error, color=colour, label=label)
    axes[-2].set_xticks(range(len(levels)), levels)
    axes[-2].set(xlabel="level", ylabel=key, title=f"{key} by level")
    if rewards:
        window = max(1, len(rewards) // 20)
        smooth = np.convolve(rewards, np.ones(window) / window, "valid")
        axes[-1].plot(np.arange(len(smooth)) + window, smooth, color="silver", label="training reward")
    for name in sorted({f"{name}@{j}" for name in names for j in (1, k)}):
        mean, error = zip(*(result["all"][name] for _, result in evaluations))
        axes[-1].errorbar([step for step, _ in evaluations], mean, error, marker="o", markersize=3, label=name)
    axes[-1].set(xlabel="step", title="training")
    axes[-1].legend()
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


SEEDS_DIFFER_IN = ("seed", "run_name", "resume", "save_every", "show_samples", "tensorboard")


def compare(folders: Sequence[str]) -> None:
    """Print how runs changed their metrics, those that differ in nothing but the seed as mean ± standard error over
    seeds, and draw their pass@j (maj@j, bon@j) curves over each other in runs/compare.png."""
    groups: dict[str, list[tuple[dict, dict]]] = {}
    for folder in map(Path, folders):
        try:
            args = json.loads((folder / "args.json").read_text())
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"{folder} is not a run folder: {error}") from error
        evaluations = [record for record in log if "eval" in record]
        if len(evaluations) < 2 or evaluations[-1]["step"] < args["steps"]:
            raise BadInput(f"{folder} has not come to its end: leave it out")
        settings = {name: value for name, value in args.items() if name not in SEEDS_DIFFER_IN}
        first, last = (evaluations[i]["eval"]["all"] for i in (0, -1))
        groups.setdefault(json.dumps(settings), []).append((first, last))
    settings = {key: json.loads(key) for key in groups}
    varying = [name for name in next(iter(settings.values())) if len({str(s.get(name)) for s in settings.values()}) > 1]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ("pass", "maj", "bon") if any(f"{name}@1" in runs[0][1] for runs in groups.values())]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for key, runs in groups.items():
        label = " ".join(f"{name}={settings[key].get(name)}" for name in varying) or settings[key]["script"]
        print(f"{label}  ({len(runs)} seeds)")
        for axis, name in zip(axes[0], names):
            metrics = [metric for metric in runs[0][1] if metric.startswith(f"{name}@")]
            js = [int(metric.partition("@")[2]) for metric in metrics]
            before = np.array([[first[metric][0] for metric in metrics] for first, _ in runs])  # (seeds, metrics)
            after = np.array([[last[metric][0] for metric in metrics] for _, last in runs])
            error = (
                (after - before).std(0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.full(len(js), np.nan)
            )
            start, end = before.mean(0), after.mean(0)
            for i, metric in enumerate(metrics):
                print(f"  {metric:8} {start[i]:.3f} -> {end[i]:.3f}  {end[i] - start[i]:+.3f} ± {error[i]:.3f}")
            (line,) = axis.plot(js, end - start, marker="o", markersize=3, label=label)
            axis.fill_between(js, end - start - error, end - start + error, color=line.get_color(), alpha=0.2)
            axis.axhline(0, color="gray", linewidth=0.8)
            axis.set(
                xscale="log", xlabel="j", ylabel=f"change of {name}@j", title=f"{name}@j, held out (± s.e. over seeds)"
            )
            axis.set_xticks(js, map(str, js))
            axis.minorticks_off()
            axis.legend()
    figure.savefig("runs/compare.png", dpi=120)
    print("figure: runs/compare.png")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "compare":
        sys.exit("usage: python common.py compare runs/a runs/b ...")
    try:
        compare(sys.argv[2:])
    except BadInput as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
