"""Models and tokenizers of a folder or of the Hugging Face hub. What is wrong with them is told in one line."""

import datetime
import os
import re
import string
from collections.abc import Sequence

import torch
import transformers

from . import BadInput, one_line
from .rows import unreachable


def undated_template(tokenizer) -> str:
    """The tokenizer's chat template, with a fixed date where it prints today's: a run that is resumed on another day
    must read the same prompts. Llama's templates print the same date where they know none."""
    calls = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"  # strftime_now('%d %b %Y')
    date = datetime.datetime(2024, 7, 26)
    return re.sub(calls, lambda call: repr(date.strftime(call[2])), tokenizer.get_chat_template())


def rendered(tokenizer, words: Sequence[str], **options) -> str:
    """One or two texts, of a user and of an assistant, as the chat template writes them. Raises BadInput.

    options: of `apply_chat_template`."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), words)]
    try:
        options |= {"chat_template": undated_template(tokenizer), "tokenize": False}
        return tokenizer.apply_chat_template(turns, **options)
    except Exception as error:  # a template is a program of the model's, which may raise anything
        why = f"the chat template of {tokenizer.name_or_path!r} cannot be rendered ({one_line(error)})"
        raise BadInput(f"{why}: mend it, or ignore --model's by --no-chat") from error


def misfit(model: torch.nn.Module, info: dict, new_head: bool) -> str:
    """How weights do not fit the model, by the `info` of loading them; "" if they do. A part that the model does not
    have at all, such as a value head, may be left out."""
    parts = {name for owner in (model, model.base_model) for name, _ in owner.named_children()}
    known = {name for name, _ in model.named_buffers()}  # no weights, yet old files hold some
    lost = [key for key in info["unexpected_keys"] if key.endswith((".weight", ".bias")) and key not in known]
    lost = [key for key in lost if key.partition(".")[0] in parts]
    shapes = [f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    troubles = {
        "its weights lack": [] if new_head else info["missing_keys"],
        "the model of its config.json has no place for its weights": lost,
        "its weights have other shapes than the model:": shapes,
    }
    return next((f"{what} {', '.join(sorted(keys))[:200]}" for what, keys in troubles.items() if keys), "")


def load_pretrained(what: str, name: str, auto: str, device: torch.device | str, new_head: bool = False, **options):
    """A model (float32, in evaluation mode, on the device) and its tokenizer.

    what: the user's name for it, "--model". name: a folder or a hub id; without a connection the cache is read. auto:
    the class of transformers that loads it. new_head: missing weights may be random ones. Raises BadInput."""
    folder, problem = os.path.expanduser(name), f"cannot load {what} {name!r}"
    here, source = os.path.isdir(folder), folder if os.path.isdir(folder) else name
    if not here and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):  # a path, not a hub id
        raise BadInput(f"{problem}: {folder} {'is a file' if os.path.exists(folder) else 'does not exist'}")
    transformers.logging.set_verbosity_error()  # the messages below say the rest
    transformers.logging.disable_progress_bar()
    silent = None if here else unreachable("model", name)
    # Else it asks the hub again and again, with a line each time, and the user whether to run the model's own code.
    safe = {"local_files_only": silent is not None, "trust_remote_code": False}
    options |= {**safe, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loading = "the model"
    try:
        if transformers.utils.find_adapter_config_file(source, local_files_only=safe["local_files_only"]):
            raise ValueError("it has a LoRA adapter: merge that into its base model, and leave adapter_config.json out")
        model, info = getattr(transformers, auto).from_pretrained(source, dtype=torch.float32, **options)
        if trouble := misfit(model, info, new_head):
            raise ValueError(trouble)
        model, loading = model.to(device).eval(), "the tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
        if {*tokenizer(" ".join(string.printable), add_special_tokens=False).input_ids} <= {tokenizer.unk_token_id}:
            raise ValueError("it knows no character")  # transformers makes one up where there is none
        loading, rows = "both", model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model knows {rows} of them")
        return model, tokenizer
    except Exception as error:  # transformers, the hub and the device raise many types
        why = one_line(error)
        if silent is not None and isinstance(error, OSError):
            why = f"it is neither a folder nor in the cache, and the hub cannot be reached ({one_line(silent)})"
        elif "trust_remote_code" in str(error):
            why = "it needs code of its own, which is not supported: choose a model of a type that transformers has"
        elif here and loading == "the tokenizer":
            why = f"it holds no tokenizer that can be read ({why}): tokenizer.save_pretrained({name!r}) writes one"
        raise BadInput(f"{problem} on device {str(device)!r}: {why}") from error
