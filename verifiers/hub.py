"""Models and tokenizers of a folder or of the Hugging Face hub. What is wrong with them is told in one line."""

import datetime
import re
from pathlib import Path

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


def load_pretrained(what: str, name: str, auto: str, device: torch.device | str, new_head: bool = False, **options):
    """A model (float32, in evaluation mode, on the device) and its tokenizer.

    what: the user's name for it, "--model". name: a folder or a hub id; without a connection the cache is read. auto:
    the class of transformers that loads it. new_head: missing weights may be random ones. Raises BadInput."""
    folder, problem = Path(name).expanduser(), f"cannot load {what} {name!r}"
    here, source = folder.is_dir(), str(folder) if folder.is_dir() else name
    if not here and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):  # a path, not a hub id
        raise BadInput(f"{problem}: {folder} {'is a file' if folder.exists() else 'does not exist'}")
    transformers.logging.set_verbosity_error()  # the messages below say the rest
    transformers.logging.disable_progress_bar()
    silent = None if here else unreachable("model", name)
    options |= {"local_files_only": silent is not None}  # else it asks again and again, and writes a line each time
    loading = "the model"
    try:
        model_class = getattr(transformers, auto)
        model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
        if info["missing_keys"] and not new_head:
            raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys']))[:200]}")
        model, loading = model.to(device).eval(), "the tokenizer"
        return model, transformers.AutoTokenizer.from_pretrained(source, local_files_only=options["local_files_only"])
    except Exception as error:  # transformers, the hub and the device raise many types
        why = one_line(error)
        if silent is not None and isinstance(error, OSError):
            why = f"it is neither a folder nor in the cache, and the hub cannot be reached ({one_line(silent)})"
        elif here and loading == "the tokenizer":
            why = f"it holds no tokenizer that can be read ({why}): tokenizer.save_pretrained({name!r}) writes one"
        raise BadInput(f"{problem} on device {str(device)!r}: {why}") from error
