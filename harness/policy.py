"""Policies: loaded from the hub or a folder, saved, fed with prompts; and the embedded `tiny`, trained here once."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers  # by its whole name: a class of it takes seconds to import, which --help need not wait for
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

import common
from common import Policy, Rollouts, padded, sample
from verifiers import BadInput, Problem, Task, one_line
from verifiers.hub import load_pretrained, rendered

from .parallel import rank0_only


def load_policy(name: str, task: Task, device="auto", gradient_checkpointing=False, chat=True) -> Policy:
    """The policy: "tiny" (warm-started on `task`, cached), "tiny-S" (the same from seed S), or a Hugging Face causal LM
    by hub id or folder. chat: use its chat template, if it has one.

    Weights are float32, under bfloat16 autocast on CUDA. Dropout is off for good: training must differentiate the
    distribution that was sampled from. Raises BadInput, also for a model whose log-probs differ: see `disagreement`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = name if tiny_seed(name) is None else tiny_policy_folder(task, tiny_seed(name))
    model, tokenizer = load_pretrained("--model", str(folder), "AutoModelForCausalLM", device)
    turn_off_dropout(model)
    if not chat and not tokenizer.chat_template:
        raise BadInput(f"--model {name!r} has no chat template: leave --no-chat out")
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    if not (stop_ids := ends_of_response(tokenizer, model.generation_config)):
        raise BadInput(f"--model {name!r} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    if odd := [i for i in stop_ids if not isinstance(i, int)]:
        raise BadInput(f"--model {name!r}: generation_config.json has eos_token_id {odd[0]!r}: give a token's number")
    policy = Policy(model, tokenizer, stop_ids)
    try:
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        trouble = disagreement(policy)
    except Exception as error:
        trouble = one_line(error)
    if trouble:
        raise BadInput(f"--model {name!r}: {type(model).__name__} cannot be trained here: {trouble}")
    return policy


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0: gradient checkpointing puts layers into training mode."""
    for owner in (*model.modules(), *(getattr(module, "config", None) for module in model.modules())):
        for name, value in vars(owner).items() if owner else ():
            if isinstance(value, float) and ("drop" in name or isinstance(owner, torch.nn.modules.dropout._DropoutNd)):
                setattr(owner, name, 0.0)


@torch.enable_grad()
def disagreement(policy: Policy) -> str:
    """How the model's ways to compute log-probs differ; "" if they agree.

    The ways are sampling with a cache, the training pass over several rows and over one (with gradient checkpointing if
    it is on), and a plain forward pass of each row without padding. The gradients of the last two are compared."""
    V = policy.model.config.get_text_config().vocab_size
    half = dataclasses.replace(policy, stop_ids=list(range(0, V, 2)))  # responses of different lengths
    short, long = ([V // 2 + i for i in range(length)] for length in (3, 8))
    rollouts = sample(half, [short, long], 6, 6, generator=torch.Generator(policy.device).manual_seed(0))
    prompts, ids, mask, sampled = rollouts.flat()

    def plain(prompt: list[int], row: torch.Tensor) -> torch.Tensor:
        """The log-probs of one response, (T,), by the model's own forward pass."""
        common.recompute_activations(policy.model, False)
        whole = torch.tensor([[*prompt, *row.tolist()]], device=policy.device)  # (1, P + T)
        with common.autocast(policy.device):
            scores = policy.model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (T, V)
        return scores.float().log_softmax(-1).gather(-1, row.unsqueeze(-1))[:, 0]

    def gradient(log_probs: torch.Tensor) -> torch.Tensor:
        """The norm of each parameter's gradient."""
        grads = torch.autograd.grad(log_probs.sum(), parameters, allow_unused=True)
        return torch.stack([torch.zeros((), device=policy.device) if g is None else g.norm() for g in grads])

    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    truth = torch.cat([plain(prompt, row[keep]) for prompt, row, keep in zip(prompts, ids, mask)])  # (M,)
    trained = common.response_log_probs(policy, prompts, ids, mask)
    alone = [common.response_log_probs(policy, [x], i[None], m[None]) for x, i, m in zip(prompts, ids, mask)]
    tolerance = 0.05 if policy.device.type == "cuda" else 5e-4  # of bfloat16, of float32
    ways = {"sampling": sampled, "training": trained, "training a row alone": torch.cat(alone)}
    for way, log_probs in ways.items():
        apart = (log_probs[mask] - truth).abs().mean().item()
        if not apart <= tolerance:  # nan is not
            return f"the log-probs of {way} and of a plain forward pass differ by {apart:.2g} nats a token"
    wanted, got = gradient(truth), gradient(trained)
    if not (wanted - got).norm() <= 10 * tolerance * wanted.norm():
        return "the gradient of training differs from the gradient of a plain forward pass"
    return ""


def save_policy(policy: Policy, folder: Path) -> None:
    """Write the model and tokenizer of a policy or `LearnedVerifier`: `from_pretrained(folder)` loads them anywhere."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def chat(tokenizer) -> tuple[str, str, str]:
    """A user's and an assistant's turn as the chat template writes them, in three parts: what the assistant reads, with
    {prompt} for the user's words; the whitespace before a response; and what follows a response.

    Raises BadInput if the template fails, or does not write the user's words."""
    read = rendered(tokenizer, ["{prompt}"], add_generation_prompt=True)
    before, _, after = rendered(tokenizer, ["{prompt}", "{response}"]).partition("{response}")
    if "{prompt}" not in read:
        raise BadInput("the chat template does not write the user's text: mend it, or ignore it by --no-chat")
    gap = before.removeprefix(read)  # some templates write an empty thought here, which a response need not repeat
    return read, gap if gap.isspace() else "", after


def ends_of_response(tokenizer, generation_config) -> list[int]:
    """The tokens that end a response. The first one also ends an expert's response: with a chat template, the first
    added token, whitespace aside, behind an assistant's turn (Qwen: <|im_end|>). End-of-sequence tokens follow."""
    after = tokenizer(chat(tokenizer)[2], add_special_tokens=False).input_ids if tokenizer.chat_template else []
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    eos = generation_config.eos_token_id if generation_config else None
    ends = [*[i for i in after if i in added][:1], tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    return [i for i in dict.fromkeys(ends) if i is not None]


def texts_read(tokenizer, task: Task, problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    """The text that a policy reads for each problem, and the whitespace between it and a response.

    A chat template, if there is one, writes both. Else a policy with a tokenizer of characters (`tiny`) reads the bare
    prompt; any other reads the task's words or template, with a space behind a word. Raises BadInput for a template
    that rewrites what a user says, by the first problem."""
    if tokenizer.chat_template:
        read, gap, _ = chat(tokenizer)
        words = [f"{problem.prompt}\n\n{task.instruction}".strip() for problem in problems]
        texts = [read.replace("{prompt}", text) for text in words]
        if texts[:1] != [rendered(tokenizer, [text], add_generation_prompt=True) for text in words[:1]]:
            raise BadInput(f"the chat template rewrites {words[0][:40]!r}: mend it, or ignore it by --no-chat")
        return texts, [gap] * len(words)
    characters = len(tokenizer.tokenize("answer")) == len("answer")
    words = task.words or (lambda prompt: task.template.replace("{prompt}", prompt))
    texts = [problem.prompt if characters else words(problem.prompt) for problem in problems]
    return texts, ["" if characters or text[-1:].isspace() else " " for text in texts]


def open_ended(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, with the special tokens that the tokenizer puts in front (a chat template writes them itself)
    and without those that it puts behind: an end token would end a prompt. Raises BadInput for half a character."""
    for text in texts:
        if half := re.search("[\ud800-\udfff]", text):
            told = text[max(0, half.start() - 40) : half.end()]
            raise BadInput(f"{told!a} ends in half a character, which no tokenizer reads: correct this row")
    coded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template, return_special_tokens_mask=True)
    behind = [[*mask[::-1], 0].index(0) for mask in coded.special_tokens_mask]
    return [ids[: len(ids) - count] for ids, count in zip(coded.input_ids, behind)]


def encode_prompts(policy: Policy, task: Task, problems: Sequence[Problem], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, see `texts_read`, `open_ended`. Raises BadInput if one and its response do not fit."""
    if not problems:
        return []
    prompts = open_ended(policy.tokenizer, texts_read(policy.tokenizer, task, problems)[0])
    for problem, ids in zip(problems, prompts):
        if not ids:
            raise BadInput(f"the prompt {problem.prompt[:40]!r} has no tokens: remove this problem")
        what = f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens}"
        refuse_too_long(policy, len(ids) + max_new_tokens, what, problem.prompt)
    return prompts


def refuse_too_long(policy: Policy, length: int, what: str, text: str) -> None:
    """Raise BadInput if `length` tokens exceed the model's context, or the length beyond which its rotary embeddings
    depend on the length of the whole: samples and training would then differ."""
    config = policy.model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    limit, why = next((x for name in names if (x := getattr(config, name, None))), math.inf), ""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))):  # one, or one a kind of layer
        original = rope.get("original_max_position_embeddings") or math.inf
        if rope.get("rope_type") in ("longrope", "dynamic") and original < limit:
            limit, why = original, f", beyond which {rope['rope_type']} embeddings make samples and training differ"
    if length > limit:
        raise BadInput(f"{what} exceed the model's context of {limit}{why}: {text[:40]!r} (shorten or remove it)")


def expert_rollouts(
    policy: Policy, task: Task, prompts: list[list[int]], groups: Sequence[Sequence[Problem]], temperature: float = 1.0
) -> Rollouts:
    """The solutions of B groups of problems, each group with one prompt, as rollouts (B, m, T). An end token is added;
    log_probs are 0. m is the size of the largest group; smaller ones are filled up with rows without tokens.

    A solution is tokenized behind its prompt, unless one token spans both: alone, Llama's tokenizers would begin it
    with a space. Raises BadInput if a prompt and its response do not fit the model's context."""
    problems, m = [problem for group in groups for problem in group], max(map(len, groups))
    texts, spaces = texts_read(policy.tokenizer, task, problems)
    alone = [space + problem.solution for space, problem in zip(spaces, problems)]
    whole = open_ended(policy.tokenizer, [text + response for text, response in zip(texts, alone)])
    pairs, rows = zip(whole, policy.tokenizer(alone, add_special_tokens=False).input_ids), []
    for prompt, group in zip(prompts, groups):
        P, own = len(prompt), list(itertools.islice(pairs, len(group)))
        own = [[*(ids[P:] if ids[:P] == prompt else bare), policy.stop_ids[0]] for ids, bare in own]
        for problem, row in zip(group, own):
            length = len(prompt) + len(row)
            refuse_too_long(policy, length, f"a prompt and its expert response, {length} tokens,", problem.solution)
        rows += own + [[]] * (m - len(own))
    ids, mask = (x.view(len(groups), m, -1).to(policy.device) for x in padded(rows))  # (B m, T) -> (B, m, T)
    return Rollouts(prompts, ids, mask, torch.zeros(ids.shape, device=policy.device), temperature)


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
    match = re.fullmatch(r"tiny(?:-(\d{1,9}))?", name)
    return match and int(match[1] or 0)


def tiny_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """One token per printable ASCII character; anything else is <unk>."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


def tiny_policy_folder(task: Task, seed: int = 0) -> Path:
    """The folder of this task's `tiny`, named by a hash of its warm-start recipe (`cached_folder`). Raises BadInput."""
    if task.warm_start is None:
        raise BadInput(f"--model tiny cannot learn task {task.name!r}: give a pretrained one by --model NAME_OR_FOLDER")
    problems = [[(problem.prompt, problem.solution) for problem in group] for group in warm_start_groups(task)]
    key = hashlib.sha256(json.dumps([TINY, seed, task.warm_start, problems]).encode()).hexdigest()[:12]
    name = f"tiny-{task.name.replace('/', '-')}-{key}"
    return cached_folder(name, lambda folder: save_policy(warm_start(task, seed), folder))


@contextlib.contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Around code that writes to a path: if no space is left, BadInput with the path, whichever library raised."""
    try:
        yield
    except Exception as error:  # torch raises another error, whose context is this one
        if "No space left on device" not in f"{error} {error.__context__}":
            raise
        raise BadInput(f"no space left on the disk of {path}: make room, then go on") from error


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name under $XDG_CACHE_HOME (~/.cache). If it is not there, `write(folder)` fills it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-aware-rl" / name
    rank0_only(lambda: write_atomically(folder, write))
    return folder


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let write(folder) fill a folder that is not there yet: it is whole or absent. Of two processes, one wins."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_told(folder), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write(Path(scratch) / folder.name)
        try:
            os.rename(Path(scratch) / folder.name, folder)
        except OSError:  # another process was first, with the same result
            if not folder.is_dir():
                raise


def warm_start_groups(task: Task) -> Sequence[Sequence[Problem]]:
    """The groups of problems, each with one prompt, that tiny learns from."""
    return task.warm_start_problems or [(problem,) for problem in task.train]


def warm_start(task: Task, seed: int = 0) -> Policy:
    """A new tiny Llama, trained on `task`'s reference solutions; the same weights for the same recipe and threads.

    Each of the m solutions of a group has weight 1/m: the target is a uniform choice. The prompt is read once."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            **TINY,
        )  # fmt: skip
        policy = Policy(transformers.LlamaForCausalLM(config), tokenizer, [tokenizer.eos_token_id])
    recipe, rng = task.warm_start, random.Random(seed)
    momenta = {p: torch.zeros_like(p) for p in policy.model.model.layers.parameters() if p.ndim == 2}
    others = [p for p in policy.model.parameters() if p not in momenta]
    optimizer = torch.optim.AdamW(others, lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=recipe["steps"])
    groups, slips = warm_start_groups(task), recipe.get("slips", 0.0)
    bar = tqdm(range(recipe["steps"]), desc=f"warm-starting tiny on {task.name} (once)", unit="step")
    for _ in bar:
        chosen = rng.choices(groups, k=recipe["batch"])
        batch = [[with_slips(problem, slips, rng) for problem in group] for group in chosen]
        prompts = encode_prompts(policy, task, [group[0] for group in batch], 1)
        experts = expert_rollouts(policy, task, prompts, batch)
        weights = experts.mask.any(-1) / experts.mask.any(-1).sum(-1, keepdim=True)  # (B, m): 1/m a solution
        weights = weights / (weights * experts.mask.sum(-1)).sum() * len(batch)  # the loss is a mean over tokens
        common.zero_gradients(policy.model.parameters())
        loss = common.accumulate_gradient(policy, experts, weights)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for p, momentum in momenta.items():  # Muon (Jordan et al. 2024) learns in half of AdamW's steps
            momentum.lerp_(p.grad, 0.05)
            p.data -= 2 * schedule.get_last_lr()[0] * orthogonal(p.grad.lerp(momentum, 0.95))
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")
    policy.model.eval()
    return policy


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with its singular values moved near 1, times sqrt(m/n) if that is more than 1.

    Five Newton-Schulz steps in float32: the bfloat16 of torch.optim.Muon is ten times slower on a CPU without it."""
    m, n = matrix.shape
    X = (matrix.T if m > n else matrix) / matrix.norm().clamp(min=1e-7)  # (min, max)
    for _ in range(5):
        gram = X @ X.T  # (min, min)
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.7750 * gram) @ X
    return math.sqrt(m / n) * X.T if m > n else X


def with_slips(problem: Problem, rate: float, rng: random.Random) -> Problem:
    """The problem with each digit of its solution replaced by a random one with probability `rate`."""
    solution = "".join(rng.choice("0123456789") if c.isdigit() and rng.random() < rate else c for c in problem.solution)
    return dataclasses.replace(problem, solution=solution)
