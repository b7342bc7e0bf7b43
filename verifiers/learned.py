"""A learned verifier: a reward model as Hugging Face users know it, `AutoModelForSequenceClassification`, one label.

It reads a prompt and a response and gives a score, by which Best-of-N selects: BoN-RL-V of Chow et al. (arXiv
2412.15287). `trained_verifier` trains one on a policy's own samples with the rewards of a task's verifier;
`load_verifier` loads any reward model by hub id or folder. It makes errors: `quality` measures them by the AUC.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import BadInput, Problem, Task, Verdict, with_checked_verdicts
from .hub import load_pretrained, rendered


@dataclasses.dataclass
class LearnedVerifier:
    """A reward model, its tokenizer, and the task whose template writes the prompts."""

    model: torch.nn.Module
    tokenizer: object
    task: Task
    budget: int = 16384  # tokens in one pass, padding included

    def tokens(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, torch.Tensor]:
        """Ids and mask (R, L) of each prompt with its response: by the chat template if there is one, else by the
        task's plain one, with an end token behind. What exceeds the model's context is cut off at the front."""
        if self.tokenizer.chat_template:
            asked = [f"{prompt}\n\n{self.task.instruction}".strip() for prompt in prompts]
            texts = [rendered(self.tokenizer, pair) for pair in zip(asked, responses)]
        else:
            end = self.tokenizer.eos_token or ""
            texts = [self.task.template.replace("{prompt}", p) + r + end for p, r in zip(prompts, responses)]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        self.tokenizer.truncation_side = "left"
        return self.tokenizer(  # RoBERTa has two positions more than it takes tokens
            texts, return_tensors="pt", padding=True, padding_side="right", truncation=True,
            max_length=min(positions, self.tokenizer.model_max_length),
            add_special_tokens=not self.tokenizer.chat_template,
        ).to(self.model.device)  # fmt: skip

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Scores (R',) of R prompts with their responses, as many at a time as the budget allows, and their slice."""
        tokens = self.tokens(prompts, responses)
        rows = max(1, self.budget // tokens["input_ids"].shape[1])
        for part in (slice(i, i + rows) for i in range(0, len(prompts), rows)):
            outputs = self.model(**{name: x[part] for name, x in tokens.items()})
            yield part, outputs.logits[:, 0].float()  # (R', 1) -> (R',)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> torch.Tensor:
        """Scores (B, n) float32 of n responses to each of B prompts, any real numbers, higher is better. Equal
        responses to equal prompts are read once: they tie to the bit."""
        pairs = [(prompt, response) for prompt, row in zip(prompts, responses) for response in row]
        unique = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))  # like lengths together
        scores = {}
        for pairs_now in (unique[i : i + 256] for i in range(0, len(unique), 256)):
            for part, logits in self.logits(*zip(*pairs_now)):
                scores |= dict(zip(pairs_now[part], logits.tolist()))
        return torch.tensor([scores[pair] for pair in pairs]).view(len(prompts), -1)


def load_verifier(
    name: str, task: Task, device: torch.device | str = "cpu", new_head: bool = False, budget: int = 16384,
    chat: bool = True,
) -> LearnedVerifier:  # fmt: skip
    """The reward model of this hub id or folder, in float32, in evaluation mode. new_head: a head that is not there
    is a random one. budget: see `LearnedVerifier`. chat: use its chat template, if it has one. Raises BadInput."""
    auto = "AutoModelForSequenceClassification"
    model, tokenizer = load_pretrained("the verifier", name, auto, device, new_head, num_labels=1)
    verifier = LearnedVerifier(model, tokenizer, task, budget)
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    if tokenizer.chat_template:
        read = rendered(tokenizer, ["{prompt}", "{response}"])
        if missing := [word for word in ("prompt", "response") if f"{{{word}}}" not in read]:
            raise BadInput(f"the chat template of the verifier {name!r} does not write the {missing[0]}: mend it")
    if tokenizer.pad_token_id is None:  # transformers finds the last token by it
        if tokenizer.eos_token_id is None:
            raise BadInput(f"the verifier {name!r} has neither pad nor eos token: set one in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return verifier


def trained_verifier(
    base: str, task: Task, problems: Sequence[Problem], responses: Sequence[Sequence[str]], rewards: torch.Tensor,
    device: torch.device | str = "cpu", lr: float = 1e-3, batch: int = 128, epochs: int = 2, seed: int = 0,
    budget: int = 16384, chat: bool = True,
) -> LearnedVerifier:  # fmt: skip
    """A verifier fitted to `rewards` (B, n) in [0, 1] of `responses` (B lists of n) by cross-entropy.

    base: hub id or folder of the model whose weights it starts from; its classification head is new. chat: it reads by
    the chat template of base, if there is one. It learns only from problems with both right and wrong samples:
    selecting is telling samples of one problem apart. Raises BadInput for rewards outside [0, 1], and where no problem
    has both."""
    if not ((rewards >= 0) & (rewards <= 1)).all():
        raise BadInput("a verifier is trained on rewards from 0 to 1: this task has others")
    mixed = (rewards.amin(-1) < rewards.amax(-1)).nonzero()[:, 0].tolist()
    if not mixed:
        raise BadInput("no problem has both right and wrong samples: a verifier has nothing to learn from")
    problems, responses, rewards = [problems[i] for i in mixed], [responses[i] for i in mixed], rewards[mixed]
    with torch.random.fork_rng(devices=[]):  # the new head's initial weights
        torch.manual_seed(seed)
        verifier = load_verifier(base, task, device, new_head=True, budget=budget, chat=chat)
    prompts = [problem.prompt for problem, row in zip(problems, responses) for _ in row]
    texts, labels = [response for row in responses for response in row], rewards.flatten().to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(texts), generator=generator) for _ in range(epochs)]).split(batch)
    optimizer = torch.optim.AdamW(verifier.model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(order) + 1)
    for rows in tqdm(order, desc="training the verifier", unit="step"):
        optimizer.zero_grad()
        for part, logits in verifier.logits([prompts[i] for i in rows], [texts[i] for i in rows]):
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows[part].to(device)]) * (len(logits) / len(rows))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(verifier.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return verifier


def with_scores(task: Task, verifier: LearnedVerifier) -> Task:
    """The same task; its verdicts also hold the verifier's scores."""

    def verify(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
        verdict = task.verify(problems, responses)
        return dataclasses.replace(verdict, scores=verifier.score([p.prompt for p in problems], responses))

    return with_checked_verdicts(dataclasses.replace(task, verify=verify))


def auc(scores: torch.Tensor, rewards: torch.Tensor) -> float:
    """Chance that a right sample scores higher than a wrong one, ties counting one half; nan without both kinds.
    scores, rewards: (M,); a reward above 1/2 is right."""
    right = rewards > 0.5
    ordered = scores[~right].sort().values
    wins = torch.searchsorted(ordered, scores[right]) + torch.searchsorted(ordered, scores[right], right=True)
    return (wins.double().mean() / (2 * len(ordered))).item() if len(ordered) and right.any() else math.nan


def quality(scores: torch.Tensor, rewards: torch.Tensor) -> str:
    """A line on a verifier's held-out samples, scores (B, n) and rewards (B, n): its AUC over all samples and within
    problems, where Best-of-N selects."""
    within = torch.tensor([auc(*row) for row in zip(scores, rewards)])  # (B,); nan without both kinds
    mixed = within.isfinite()
    return (
        f"verifier on {scores.numel()} held-out samples: AUC {auc(scores.flatten(), rewards.flatten()):.3f}, "
        f"within problems {within[mixed].mean().item():.3f} (the {int(mixed.sum())} with right and wrong samples)"
    )
