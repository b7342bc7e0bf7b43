"""Every type of causal language model in transformers trains right or is refused in one line when it is loaded."""

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_zoo import KINDS, save_tiny, tiny_model
from runs import SMALL, in_process, parity, steps_of
from safetensors.torch import load_file, save_file

import common
import harness.policy
from verifiers import BadInput, load_task

VERDICTS = {}  # of the sweep
FAST = ["gemma3", "gpt2", "jamba", "lfm2", "mamba", "opt", "qwen3", "qwen3_5_text"]


@pytest.fixture
def rewarded(monkeypatch):
    """A verifier that gives half of the responses a reward: an untrained model earns none of its own."""
    half = lambda problems, rows: parity(problems, [["x" * i for i, _ in enumerate(row)] for row in rows])  # noqa: E731
    monkeypatch.setattr("verifiers.arithmetic.verify", half)


def verdict_on(folder: str, *flags: str) -> str:
    """What becomes of two steps with this model: "trains", or the line that refuses it when it is loaded."""
    name = "-".join(["r", *flags])
    ended = in_process("pass_at_k_pg.py", *SMALL, "--model", folder, *flags, "--run-name", name)
    if ended.returncode:
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
        assert ended.returncode == 2 and "Traceback" not in ended.stderr and not (Path("runs") / name).exists()
        return line
    log = steps_of(Path("runs") / name)
    assert len(log) == 2 and not any(record["skipped"] for record in log)
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log)
    return "trains"


@pytest.mark.parametrize("kind", FAST)
def test_models_of_every_family_train(kind, run, rewarded, tmp_path):
    """Attention, sliding windows, linear layers alone and beside attention, dropout in the configuration, composite."""
    folder = save_tiny(kind, tmp_path / "model")
    assert verdict_on(folder) == verdict_on(folder, "--gradient-checkpointing") == "trains"


@pytest.mark.parametrize("kind, changes, flags, complaint", [
    ("bert", {"is_decoder": False}, [], "differ by"),  # looks both ways
    ("cohere", {}, [], "the log-probs of sampling and of a plain forward pass differ by"),  # scales its logits
    ("recurrent_gemma", {}, [], "differ by"),
    ("ctrl", {}, ["--gradient-checkpointing"], "does not support activation checkpointing"),
    ("llama", {"vocab_size": 90}, [], "the tokenizer has 99 tokens, the model knows 90 of them"),
])  # fmt: skip
def test_models_that_cannot_be_trained_are_refused_in_one_line(kind, changes, flags, complaint, run, tmp_path):
    assert complaint in verdict_on(save_tiny(kind, tmp_path / "model", **changes), *flags)


def config(name="config.json", **changes):
    """What changes a JSON file of a folder."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def weight(name):
    """What adds a weight to those of a folder."""
    return lambda folder: save_file(
        load_file(folder / "model.safetensors") | {name: torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"}
    )


def without_tokenizer(folder):
    [file.unlink() for file in folder.glob("tokenizer*")]


BIAS, NO_PLACE = "model.layers.0.self_attn.q_proj.bias", "ValueError: the model of its config.json has no place for its"
NO_TOKENIZER = "it holds no tokenizer that can be read (ValueError: it knows no character): tokenizer.save_pretrained("
SPOILT = {  # type, what is done to its folder, the complaint or "" for none
    "a layer more": ("llama", config(num_hidden_layers=1), f"{NO_PLACE} weights model.layers.1.input_layernorm.weight"),
    "a bias": ("llama", weight(BIAS), f"{NO_PLACE} weights {BIAS}"),
    "a layer more, of a base model": ("llama", weight("layers.2.mlp.bias"), f"{NO_PLACE} weights layers.2.mlp.bias"),
    "a value head": ("llama", weight("v_head.summary.weight"), ""),
    "a mask, in old files": ("gpt_neo", weight("transformer.h.0.attn.attention.bias"), ""),
    "another mask, in old files": ("gpt2", weight("transformer.h.0.attn.masked_bias"), ""),
    "other shapes": ("llama", config(intermediate_size=32), "its weights have other shapes than the model: "
                     "model.layers.0.mlp.down_proj.weight (32, 64), not (32, 32), model"),
    "its own code": ("llama", config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
                     "it needs code of its own, which is not supported: choose a model of a type that transformers"),
    "an adapter": ("llama", lambda folder: (folder / "adapter_config.json").write_text("{}"),
                   "it has a LoRA adapter: merge that into its base model, and leave adapter_config.json out"),
    "an end in words": ("llama", config("generation_config.json", eos_token_id="</s>"),
                        "generation_config.json has eos_token_id '</s>': give a token's number"),
    "no tokenizer, unknown tokens": ("gemma2", without_tokenizer, NO_TOKENIZER),
    "no tokenizer, no tokens": ("gpt2", without_tokenizer, NO_TOKENIZER),
}  # fmt: skip


@pytest.mark.parametrize("kind, spoil, complaint", SPOILT.values(), ids=SPOILT)
def test_a_folder_whose_files_do_not_make_one_model(kind, spoil, complaint, tmp_path):
    """Else another model would be trained, without a word."""
    spoil(Path(save_tiny(kind, tmp_path)))
    with pytest.raises(BadInput, match=re.escape(complaint)) if complaint else nullcontext():
        harness.policy.load_policy(str(tmp_path), load_task("arithmetic"), "cpu")


def test_a_gradient_that_is_wrong_is_refused(tmp_path, monkeypatch):
    """The log-probs agree here; a part of the network is cut out of the backward pass of training alone."""
    folder, task = save_tiny("llama", tmp_path / "model"), load_task("arithmetic")
    states = common.response_log_probs
    monkeypatch.setattr(common, "response_log_probs", lambda *a: 2 * (x := states(*a)) - x.detach())
    with pytest.raises(BadInput, match="the gradient of training differs"):
        harness.policy.load_policy(folder, task, "cpu")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_dropout_is_off_for_good(kind, tmp_path):
    """GPT-2 has it in modules of its own; the modules and the configuration of OPT keep numbers. A policy can be loaded
    where gradients are off, as evaluations do: the self-test switches them on for itself."""
    with torch.no_grad():
        model = harness.policy.load_policy(save_tiny(kind, tmp_path / "model"), load_task("arithmetic"), "cpu").model
    for owner in (model.config, *model.modules()):
        rates = [x for name, x in vars(owner).items() if "drop" in name and isinstance(x, float)]
        assert not any(rates) and not (isinstance(owner, torch.nn.Dropout) and owner.p)
    assert any(x == 0.1 for name, x in tiny_model(kind).config.to_dict().items() if "drop" in name)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_embeddings_that_depend_on_the_length_of_the_whole_stop_at_the_original_context(rope_type, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    folder, task = save_tiny("llama", tmp_path / "model", rope_parameters=rope), load_task("arithmetic")
    policy = harness.policy.load_policy(folder, task, "cpu")
    problem = task.train[0]
    harness.policy.encode_prompts(policy, task, [problem], 32 - len(problem.prompt))
    with pytest.raises(BadInput, match=f"context of 32, beyond which {rope_type} embeddings make samples"):
        harness.policy.encode_prompts(policy, task, [problem], 33 - len(problem.prompt))


def test_a_prompt_and_its_response_fit_the_context_of_mpt():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_seq_len=32))
    policy = common.Policy(SimpleNamespace(config=config), None, [])
    harness.policy.refuse_too_long(policy, 32, "they", "1+1=")
    with pytest.raises(BadInput, match="they exceed the model's context of 32: '1\\+1='"):
        harness.policy.refuse_too_long(policy, 33, "they", "1+1=")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_of_all_types(kind, run, rewarded, tmp_path, capsys):
    """A row of a table, `pytest -s`: the type trains (it passed the self-test at load, and two steps had a gradient),
    with and without gradient checkpointing, or is refused with its reason, or has no tiny configuration here."""
    try:
        folder = save_tiny(kind, tmp_path / "model")
    except Exception as error:
        VERDICTS[kind] = None
        pytest.skip(f"not built ({type(error).__name__})")
    plain, checkpointed = verdict_on(folder), verdict_on(folder, "--gradient-checkpointing")
    with capsys.disabled():
        print(f"\n{kind:26} {plain if plain == checkpointed else f'{plain}; checkpointed: {checkpointed}'}")
    VERDICTS[kind] = plain


@pytest.mark.slow
def test_most_types_train():
    """It counts what the sweep before it has built, and what of it trains."""
    if VERDICTS.keys() != {*KINDS}:
        pytest.skip(f"{len(VERDICTS)} of {len(KINDS)} types were tried: run the whole sweep first, in one process")
    assert sum(verdict is not None for verdict in VERDICTS.values()) > 130
    assert sum(verdict == "trains" for verdict in VERDICTS.values()) >= 120
