"""Which objective are you training? The advantage estimators that an engine brings, run on all 0/1 patterns of n = 8.

    python benchmarks/engines.py               # the engines that are installed here
    python benchmarks/engines.py --publish     # and put their tables into docs/engines.md

Each engine takes an environment of its own:

    trl      pip install trl==1.16.0 tyro==1.0.17
    verl     pip install verl==0.9.1 tyro==1.0.17 TransferQueue==0.1.11 cachetools==8.0.2 uvicorn fastapi
    skyrl    pip install --no-deps skyrl==0.3.0 && pip install torch numpy ray tyro==1.0.17 transformers pydantic loguru
             omegaconf jaxtyping tensordict skyrl-gym

The rewards of n samples to each of B prompts go in as the engine's trainer passes them on, the advantages come out;
`spectrum.worth` reads off what they maximise. All engines average over rows: the tables have the spectrum of A / n.
A rule that is refused for its responses' lengths is run again with equal ones. The second table is what each loss makes
of an advantage, from its gradient in the log-probs: which sum to undo.
"""

import importlib.metadata
import importlib.util
import inspect
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import measure  # first: puts the repository on the path
import numpy as np
import spectrum
import torch

from pass_at_k_pg import advantages as pass_at_k
from verifiers import BadInput

N, K = 8, 4
PAGE = "docs/engines.md"
LIMIT = 5e-3  # of the error of a weight: engines compute in float32
Rules = dict[str, Callable | str]  # name -> (B, n) rewards -> (B, n) advantages, or why there is none
Losses = Iterator[tuple[str, torch.Tensor]]  # name, and the gradient (R, T) in the log-probs where all advantages are 1


@dataclass
class Args:
    publish: bool = False  # put the tables of the engines that are installed here into docs/engines.md


def of_tokens(call: Callable) -> Callable:
    """An estimator of token-level rewards, with the reward at the last token, as (B, n) -> (B, n), divided by n.

    call(rewards (R, 3), mask (R, 3), index (R,)) returns advantages (R, 3), equal at all tokens of a response. The
    responses have 1, 2, 3, 1, ... tokens or, if all are `equal`, 3."""

    def advantages(rewards: torch.Tensor, equal: bool = False) -> torch.Tensor:
        B, n = rewards.shape
        lengths = torch.full((B * n,), 3) if equal else torch.arange(B * n) % 3 + 1  # (R,)
        mask = (torch.arange(3) < lengths.unsqueeze(-1)).double()  # (R, T)
        last = (mask.sum(-1, keepdim=True) - 1).long()
        tokens = torch.zeros_like(mask).scatter(-1, last, rewards.reshape(-1, 1))  # (B, n) -> (R, T)
        index = np.array([f"prompt {b}" for b in range(B) for _ in range(n)], dtype=object)
        A = call(tokens, mask, index)  # (R, T)
        if not torch.allclose(A * mask, A[:, :1] * mask, rtol=1e-5, atol=1e-9):
            raise BadInput("refused: tokens of one response have different advantages")
        return A[:, 0].view(B, n) / n  # (R,) -> (B, n)

    return advantages


def registered(functions: dict[str, Callable], flag: str, values: Callable) -> Rules:
    """The rules of a registry of functions of token-level rewards.

    flag: the name of their argument that says whether to divide by the standard deviation. values: (name, flag's value)
    -> the other arguments that an engine's trainer passes on."""
    rules, passed = {}, {"token_level_rewards", "response_mask", "index", "kwargs"}
    for name, function in functions.items():
        known = inspect.signature(function).parameters
        if needed := {x for x, p in known.items() if p.default is p.empty} - passed - {*values(name, None)}:
            rules[name] = f"takes more than outcome rewards: {', '.join(sorted(needed))}"
            continue
        for value in (True, False) if flag in known else (None,):
            options = values(name, value) | ({} if value is None else {flag: value})

            def call(rewards, mask, index, function=function, known=known, options=options):
                options = {x: v for x, v in {"index": index, **options}.items() if x in known or "kwargs" in known}
                return function(token_level_rewards=rewards, response_mask=mask, **options)[0]

            rules[name if value is None else f"{name}, {flag}={value}"] = of_tokens(call)
    return rules


def verl_rules() -> Rules:
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    def config(name, by_std):
        return {"config": AlgoConfig(adv_estimator=name, norm_adv_by_std_in_grpo=by_std is not False)}

    return registered(ADV_ESTIMATOR_REGISTRY, "norm_adv_by_std_in_grpo", config)


def skyrl_utils():
    """SkyRL's ppo_utils. On Python below 3.12 pydantic refuses typing.TypedDict, which SkyRL uses."""
    if sys.version_info < (3, 12):
        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict
    from skyrl.backends.skyrl_train.utils import ppo_utils

    return ppo_utils


def skyrl_rules() -> Rules:
    registry = skyrl_utils().AdvantageEstimatorRegistry
    functions = {name: registry.get(name) for name in registry.list_available()}
    return registered(functions, "grpo_norm_by_std", lambda *_: {"gamma": 1.0})


def trl_trainer(name: str, reward: Callable, **settings):
    """A trainer of TRL on the smallest of models, one token a response."""
    import trl
    from datasets import Dataset

    policy = measure.tiny_policy("cpu", hidden=16, layers=1, stop=10)
    folder = tempfile.mkdtemp()
    config = getattr(trl, f"{name}Config")(
        folder, num_generations=N, per_device_train_batch_size=N, max_completion_length=3, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no",
        save_strategy="no", beta=0.0, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "1"}] * N)
    trainer = getattr(trl, f"{name}Trainer")(
        policy.model, reward, config, train_dataset=data, processing_class=policy.tokenizer
    )
    trainer.model.train()
    return trainer


NO_SCALE = {"scale_rewards": "none"}
TRL = {  # name -> trainer, settings, what the reward function returns
    'GRPO, scale_rewards="group"': ("GRPO", {"scale_rewards": "group"}, lambda r: r),
    'GRPO, scale_rewards="batch"': ("GRPO", {"scale_rewards": "batch"}, lambda r: r),
    'GRPO, scale_rewards="none"': ("GRPO", NO_SCALE, lambda r: r),
    'GRPO, multi_objective_aggregation="normalize_then_sum"': (
        "GRPO", {"multi_objective_aggregation": "normalize_then_sum"}, lambda r: r,
    ),
    "RLOO": ("RLOO", {}, lambda r: r),
    "RLOO, normalize_advantages=True": ("RLOO", {"normalize_advantages": True}, lambda r: r),
    'GRPO, scale_rewards="none", the reward function returns n b(5)': (
        "GRPO", NO_SCALE, lambda r: N * pass_at_k(r, K + 1, "biased"),
    ),
    'GRPO, scale_rewards="none", the reward function returns n u(4)': ("GRPO", NO_SCALE, lambda r: N * pass_at_k(r, K)),
}  # fmt: skip


def trl_rules() -> Rules:
    def rule(kind: str, settings: dict, returned: Callable) -> Callable:
        now = []
        trainer = trl_trainer(kind, lambda completions, **_: now[-1].flatten().tolist(), **settings)

        def advantages(rewards: torch.Tensor) -> torch.Tensor:
            now[:] = [returned(rewards)]
            inputs = [{"prompt": str(b)} for b in range(len(rewards)) for _ in range(N)]
            return trainer._generate_and_score_completions(inputs)["advantages"].view(-1, N) / N

        return advantages

    return {name: rule(*setting) for name, setting in TRL.items()}


TOKENS = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).float()  # (R, T): two prompts, two samples each


def token_weights(gradient: torch.Tensor) -> str:
    """In words: by what a response's token is weighted, from (R, T) gradients of the loss, all advantages being 1."""
    R, T = TOKENS.shape
    own, tokens = TOKENS.sum(-1, keepdim=True), TOKENS.sum()
    prompt = own.view(2, 2).sum(-1).repeat_interleave(2).unsqueeze(-1)
    known = {
        "1 / rows: a mean over responses; times n, it is ours": TOKENS / R,
        "1 / (rows x longest allowed): times n and that length, it is ours": TOKENS / (R * T),
        "1 / all tokens of the batch: long batches count less": TOKENS / tokens,
        "1 / (rows x own length): long responses count less a token": TOKENS / (R * own),
        "1 / (prompts x all tokens of the prompt's responses)": TOKENS / (2 * prompt),
        "1: a sum over all": TOKENS,
    }
    matches = [words for words, weight in known.items() if torch.allclose(-gradient, weight, atol=1e-6)]
    return matches[0] if matches else f"something else: {(-gradient).tolist()}"


def verl_losses() -> Losses:
    from verl.trainer.ppo.core_algos import agg_loss

    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        log_probs = torch.zeros(TOKENS.shape, requires_grad=True)
        agg_loss(-log_probs, TOKENS, mode).backward()
        yield f"loss_agg_mode={mode}", log_probs.grad


def skyrl_losses() -> Losses:
    scaled = skyrl_utils().apply_loss_reduction_to_advantages_minibatch
    for mode in ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"):
        A = scaled(torch.ones(TOKENS.shape), TOKENS, mode, len(TOKENS), TOKENS.shape[1], [(0, 2), (2, 4)])
        yield f"loss_reduction={mode}", -A * TOKENS


def trl_losses() -> Losses:
    for name, settings in [*(("GRPO", {"loss_type": x}) for x in ("dapo", "dr_grpo", "grpo", "bnpo")), ("RLOO", {})]:
        trainer = trl_trainer(name, lambda completions, **_: [0.0] * len(completions), **settings)
        log_probs = torch.zeros(TOKENS.shape, requires_grad=True)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, torch.zeros(TOKENS.shape), None)
        trainer.current_gradient_accumulation_steps, ids = 1, torch.ones(TOKENS.shape).long()
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": TOKENS.long(),
            "advantages": torch.ones(len(TOKENS)), "old_logps": torch.zeros(len(TOKENS)),
            "num_items_in_batch": TOKENS.sum(),
        }  # fmt: skip
        trainer._compute_loss(trainer.model, inputs).backward()
        yield name + "".join(f", {x}={y}" for x, y in settings.items()), log_probs.grad


ENGINES = {"trl": (trl_rules, trl_losses), "verl": (verl_rules, verl_losses), "skyrl": (skyrl_rules, skyrl_losses)}


def row(name: str, rule: Callable | str, again: bool) -> list[str]:
    """Name, D, w, what it maximises, remark. again: where the rule is refused, try it with equal lengths."""
    remark = ""
    if isinstance(rule, str):
        return [name, "", "", "not run", rule]
    try:
        try:
            D = spectrum.worth(rule, N)
        except BadInput:
            if not again:
                raise
            D = spectrum.worth(partial(rule, equal=True), N)
            remark = "only where all responses are equally long: its baseline reads lengths"
    except Exception as error:  # whatever an engine raises says why there is no row
        why = " ".join(str(error).split()) or type(error).__name__
        return [name, "", "", "refused", why.removeprefix("refused: ").partition(":")[0]]
    eps = max(spectrum.precision(rule, N), torch.finfo(torch.float32).eps)  # parts of them are float32
    w = [x if abs(x) > 5e-4 else 0.0 for x in spectrum.weights(D, eps, LIMIT)]
    words = spectrum.maximises(D, 1e-5, 1.0)
    return [name, spectrum.numbers(D, ".3f"), spectrum.numbers(w, ".3f"), words, remark]


def tables(engine: str) -> str:
    """Both tables of an engine that is installed here, in Markdown."""
    rules, losses = ENGINES[engine]
    head = ["name", "D(0) .. D(7)", "w of pass@1 .. pass@8", "maximises", "remark"]
    rows = [row(name, rule, engine != "trl") for name, rule in rules().items()]
    weights = [[name, token_weights(gradient)] for name, gradient in losses()]
    of_loss = measure.markdown(["loss", "a token of a response with A = 1 is weighted by"], weights)
    return f"{engine} {importlib.metadata.version(engine)}\n\n{measure.markdown(head, rows)}\n\n{of_loss}"


def main(args: Args) -> None:
    installed = [engine for engine in ENGINES if importlib.util.find_spec(engine)]
    if not installed:
        raise BadInput("none of trl, verl and skyrl is installed: see the top of this file")
    found = {engine: tables(engine) for engine in installed}
    print("\n\n".join(found.values()))
    if args.publish:
        measure.publish(found)


if __name__ == "__main__":
    measure.program(main, Args)
