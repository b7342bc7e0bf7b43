"""Policies: loaded from the hub or a folder, saved, fed with prompts; and the embedded `tiny`, trained here once."""

import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from common import Policy, Rollouts, logits, padded, response_log_probs
from verifiers import BadInput, Problem, Task

from .parallel import in_first_process


def load_policy(name: str, task: Task, device: str = "auto", gradient_checkpointing: bool = False) -> Policy:
    """The policy: "tiny" (warm-started on `task`, cached), "tiny-S" (the same from seed S), or a Hugging Face causal LM
    by hub id or folder.

    Weights are float32; on CUDA they are used under bfloat16 autocast. Dropout is off for good: the log-probs that
    training differentiates must be those of the distribution that was sampled from. Raises BadInput."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # ours say more
    folder = name if tiny_seed(name) is None else tiny_policy_folder(task, tiny_seed(name))
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
    ids = torch.tensor([[policy.stop_ids[0], 0, 1]], device=model.device)
    with torch.no_grad():  # whether the model does more between its last hidden state and its logits than we know of
        hidden = getattr(model.base_model(ids), "last_hidden_state", None)
        if hidden is None or not torch.allclose(logits(model, hidden), model(ids).logits, atol=1e-3, rtol=1e-3):
            raise BadInput(f"--model {name!r}: {type(model).__name__} computes its logits in an unsupported way")
    return policy


def save_policy(policy: Policy, folder: Path) -> None:
    """Write model and tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` loads them anywhere."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def chat(problem: Problem, task: Task, response: str | None = None) -> list[dict]:
    """A chat's turns: the user's, with the problem and the task's instruction, and the response, if there is one."""
    turns = [{"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}".strip()}]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


def encode_prompts(policy: Policy, task: Task, problems: Sequence[Problem], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt: by the tokenizer's chat template if it has one, else by the task's plain template.

    Raises BadInput if a prompt and its response would not fit the model's context."""
    if policy.tokenizer.chat_template:
        turns = [chat(problem, task) for problem in problems]
        texts = policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts = policy.tokenizer(texts, add_special_tokens=False).input_ids  # the template has written them
    else:
        prompts = policy.tokenizer([plain_text(policy, task, p.prompt) for p in problems]).input_ids
    for problem, ids in zip(problems, prompts):
        if not ids:
            raise BadInput(f"the prompt {problem.prompt[:40]!r} has no tokens: remove this problem")
        what = f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens}"
        refuse_too_long(policy, len(ids) + max_new_tokens, what, problem.prompt)
    return prompts


def reads_characters(policy: Policy) -> bool:
    """Whether each token but special ones is a character: as `tiny`'s are, also where it is loaded from a folder."""
    special = set(policy.tokenizer.all_special_tokens)
    return all(len(token) == 1 for token in policy.tokenizer.get_vocab() if token not in special)


def plain_text(policy: Policy, task: Task, prompt: str) -> str:
    """What a model without a chat template reads: the task's template, or its words where the model may know words."""
    if task.words and not reads_characters(policy):
        return task.words(prompt)
    return task.template.replace("{prompt}", prompt)


def refuse_too_long(policy: Policy, length: int, what: str, text: str) -> None:
    """Raise BadInput if what is so many tokens long exceeds the model's context."""
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    if length > context:
        raise BadInput(f"{what} exceed the model's context of {context}: {text[:40]!r} (shorten it or remove it)")


def end_of_response(policy: Policy, task: Task) -> int:
    """The token that ends a response: what ends the assistant's turn in the chat template (Gemma: <end_of_turn>), else
    the end-of-sequence token."""
    if policy.tokenizer.chat_template:
        text = policy.tokenizer.apply_chat_template(chat(Problem("?", ""), task, "!"), tokenize=False)
        ends = [i for i in policy.tokenizer(text, add_special_tokens=False).input_ids if i in policy.stop_ids]
        if ends:
            return ends[-1]
    end = policy.tokenizer.eos_token_id
    return policy.stop_ids[0] if end is None else end


def expert_rollouts(
    policy: Policy, task: Task, groups: Sequence[Sequence[Problem]], temperature: float = 1.0
) -> Rollouts:
    """The solutions of B groups of problems as rollouts, with an end token behind; log_probs are 0: (B, m, T).

    A group's problems share their prompt; m is the most in a group, and rows that a group lacks have no tokens. Raises
    BadInput if a prompt and its response do not fit the model's context."""
    firsts = [group[0] for group in groups]
    prompts = encode_prompts(policy, task, firsts, 1)
    plain = not policy.tokenizer.chat_template
    space = " " if plain and not reads_characters(policy) and not plain_text(policy, task, "?")[-1:].isspace() else ""
    solutions = [problem.solution for group in groups for problem in group]
    rows = policy.tokenizer([space + solution for solution in solutions], add_special_tokens=False).input_ids
    end, m = end_of_response(policy, task), max(map(len, groups))
    rows = iter([*row, end] for row in rows)
    table = [[next(rows) if i < len(group) else [] for i in range(m)] for group in groups]
    for prompt, row, group in zip(prompts, table, groups):
        for problem, ids in zip(group, row):
            length = len(prompt) + len(ids)
            what = f"a prompt and its expert response, {length} tokens,"
            refuse_too_long(policy, length, what, problem.solution)
    ids, mask = (x.unflatten(0, (-1, m)).to(policy.device) for x in padded([ids for row in table for ids in row]))
    return Rollouts(prompts, ids, mask, torch.zeros(ids.shape, device=policy.device), temperature)  # (B, m, T) each


# --- The embedded policy. What is in TINY, in the task's problems and in its warm-start recipe decides the weights. ---

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "initializer_range": 0.08,  # about 1/sqrt(hidden): with the usual 0.02 so narrow a model learns half as fast
}


def tiny_seed(name: str) -> int | None:
    """S where the name of a model is tiny-S, 0 where it is tiny; None for other models."""
    match = re.fullmatch(r"tiny(?:-(\d+))?", name)
    return match and int(match[1] or 0)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; anything else is <unk>."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


def tiny_policy_folder(task: Task, seed: int = 0) -> Path:
    """Where the warm-started `tiny` policy for this task lies, named by a hash of its recipe; see `cached`."""
    if task.warm_start is None:
        raise BadInput(f"--model tiny cannot learn task {task.name!r}: give a pretrained one by --model NAME_OR_FOLDER")
    problems = [[(problem.prompt, problem.solution) for problem in group] for group in warm_start_groups(task)]
    key = hashlib.sha256(json.dumps([TINY, seed, task.warm_start, problems]).encode()).hexdigest()[:12]
    name = f"tiny-{task.name.replace('/', '-')}-{key}"
    return cached(name, lambda folder: save_policy(warm_start(task, seed), folder))


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name under $XDG_CACHE_HOME (~/.cache); `write(folder)` fills it if it is not there yet."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-aware-rl" / name
    in_first_process(lambda: write_whole(folder, write))
    return folder


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let write(folder) fill a folder that is not there yet. It is whole or absent, whenever the process dies.

    Two processes may race: both write, one wins."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write(Path(scratch) / folder.name)
        try:
            os.rename(Path(scratch) / folder.name, folder)
        except OSError:  # another process was first; its result is the same
            if not folder.is_dir():
                raise


def warm_start_groups(task: Task) -> Sequence[tuple[Problem, ...]]:
    """What `tiny` is warm-started on; see `Task.warm_start_problems`."""
    return task.warm_start_problems or [(problem,) for problem in task.train]


def warm_start(task: Task, seed: int = 0) -> Policy:
    """A new tiny Llama, trained on `task`'s reference solutions; the same weights for the same recipe and threads."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            **TINY,
        )  # fmt: skip
        policy = Policy(LlamaForCausalLM(config), tokenizer, [tokenizer.eos_token_id])
    recipe, rng = task.warm_start, random.Random(seed)
    momenta = {p: torch.zeros_like(p) for p in policy.model.model.layers.parameters() if p.ndim == 2}
    others = [p for p in policy.model.parameters() if p not in momenta]
    optimizer = torch.optim.AdamW(others, lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=recipe["steps"])
    groups = warm_start_groups(task)
    bar = tqdm(range(recipe["steps"]), desc=f"warm-starting tiny on {task.name} (once)", unit="step")
    for _ in bar:
        batch = rng.choices(groups, k=recipe["batch"])
        problems = [problem for group in batch for problem in group]
        weight = torch.tensor([1 / len(group) for group in batch for _ in group]).unsqueeze(-1)  # (R, 1)
        prompts = tokenizer([problem.prompt for problem in problems]).input_ids
        solutions = [with_slips(problem.solution, recipe.get("slips", 0.0), rng) for problem in problems]
        ids, mask = padded(tokenizer([solution + tokenizer.eos_token for solution in solutions]).input_ids)
        loss = -(weight * response_log_probs(policy, prompts, ids, mask)).sum() / (weight * mask).sum()
        policy.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for p, momentum in momenta.items():  # Muon (Jordan et al. 2024) learns in half of AdamW's steps
            momentum.lerp_(p.grad, 0.05)
            p.data -= 2 * schedule.get_last_lr()[0] * orthogonal(p.grad.lerp(momentum, 0.95))
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    policy.model.eval()
    return policy


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with its singular values moved near 1, times sqrt(m/n) if that is more than 1.

    It takes five Newton-Schulz steps in float32. torch.optim.Muon takes them in bfloat16, which is ten times as slow or
    more on a CPU without it."""
    m, n = matrix.shape
    X = (matrix.T if m > n else matrix) / matrix.norm().clamp(min=1e-7)  # (min, max)
    for _ in range(5):
        gram = X @ X.T  # (min, min)
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.7750 * gram) @ X
    return math.sqrt(m / n) * X.T if m > n else X


def with_slips(solution: str, rate: float, rng: random.Random) -> str:
    """The solution with each digit replaced by a random one with probability `rate`."""
    return "".join(rng.choice("0123456789") if c.isdigit() and rng.random() < rate else c for c in solution)
