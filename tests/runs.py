"""Scripts run in this process, a small policy for them to train, and what their runs leave."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import common
import harness.policy
import harness.run
from verifiers import Verdict, arithmetic

arithmetic.TRAIN_PER_LEVEL = 400  # making and reading all takes as long as a small run's steps
ROOT = Path(__file__).parent.parent
SCRIPTS = ["pass_at_k_pg.py", "majority_pg.py", "bon_rl.py", "bon_sft.py"]
# On level 1 the `skilled` policy is right now and then; its problems are few, and read within a moment.
SMALL = "--task arithmetic --levels 1 --steps 2 --k 2 --n 4 --prompts-per-step 4 --eval-n 4 --eval-problems 2".split()
FLAGS = [*SMALL, "--steps", "6", "--save-every", "2", "--eval-every", "3"]
EXTRA = {"bon_rl.py": ["--estimator", "variational", "--n", "6", "--baseline", "value", "--kl-coef", "0.1"]}


def of_script(script: str, text: str) -> str:
    """The Best-of-N scripts say N where the others say k."""
    return re.sub("--k\\b", "--N", text) if script.startswith("bon") else text


def parsed(command: str):
    """The arguments that a command's script reads in its flags, none of which is idle: the script would stop."""
    script, *flags = shlex.split(command)
    Args = importlib.import_module(script.removesuffix(".py")).Args
    args, default = tyro.cli(Args, args=flags), Args()
    for name, (_, used) in harness.run.IDLE_WITHOUT.items():
        assert getattr(args, name, None) == getattr(default, name, None) or used(args), name
    return args


def as_main(script: str, *flags: str) -> Callable[[], None]:
    """A function that runs the script as __main__ with these flags."""

    def main():
        sys.argv = [script, *(of_script(script, flag) for flag in flags)]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return main


def in_process(script: str, *flags: str, code: int | None = None) -> SimpleNamespace:
    """The script run as __main__ in this process, which saves importing torch: returncode, stdout, stderr. code: the
    exit code that it must have, if one is given."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [])  # put back at the end
        try:
            as_main(script, *flags)()
            returncode = 0
        except SystemExit as stop:
            returncode = stop.code
    assert code in (None, returncode), err.getvalue()
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


def run_as_rank(main: Callable[[], None], cwd: Path, rank: int, port: int) -> None:
    """main() in one of two processes. It writes to `cwd`/out-RANK and err-RANK."""
    os.chdir(cwd)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in place.items()})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    harness.policy.disagreement, harness.report.save_figure = lambda policy: "", no_figure
    main()


def at_call(number: int, action: Callable, function: Callable, rank: int | None = None) -> Callable:
    """The function, whose number-th call begins with action(its arguments), in one process if a rank is given."""
    calls = []

    def with_action(*args, **others):
        calls.append(args)
        if len(calls) == number and (rank is None or os.environ["RANK"] == str(rank)):
            action(*args)
        return function(*args, **others)

    return with_action


def no_figure(folder: Path, *_) -> None:
    """In place of harness.report.save_figure, which takes as long as the rest of a run here."""
    (folder / "curves.png").touch()


def in_two_processes(main: Callable[[], None], cwd: Path, code: int | None = 0) -> tuple[str, str]:
    """stdout and stderr of main() in two processes. As under torchrun, a process that fails takes the other with it.
    code: the exit code that the first to fail must have; None: any but 0.

    They are forked from this process: they have its imports, which take six seconds, and what a test put in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_as_rank, args=(main, cwd, rank, port)) for rank in (0, 1)]
    [process.start() for process in processes]
    running, codes = {process.sentinel: process for process in processes}, []
    while running and (ended := connection.wait(running, timeout=5 if any(codes) else 120)):
        for process in map(running.pop, ended):
            process.join()
            codes.append(process.exitcode)
        [process.terminate() for process in running.values() if any(codes)]
    [(process.kill(), process.join()) for process in processes]
    out, err = ("".join((cwd / f"{name}-{rank}").read_text() for rank in (0, 1)) for name in ("out", "err"))
    failed = next(filter(None, codes), 0)
    assert failed or not running, f"it hung: {out}\n{err}"
    assert failed == code or code is None and failed, f"{failed}: {out}\n{err}"
    return out, err


def torchrun(*command, cwd: Path) -> subprocess.CompletedProcess:
    """The command in two processes, by torchrun itself."""
    words = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 --".split(), *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


def parity(problems, rows) -> Verdict:
    """A verifier that an untrained policy is right by now and then: responses of an odd length earn 1."""
    rewards = torch.tensor([[float(len(response) % 2) for response in row] for row in rows])
    return Verdict(rewards, torch.zeros(rewards.shape, dtype=torch.int64))


def save_untrained(folder: Path, eos: bool = True, pad: bool = True, context: int = 64) -> str:
    """Random weights on characters, 16 wide, saved; never right in arithmetic."""
    tokenizer = harness.policy.tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<eos>" if eos else None, "<pad>" if pad else None
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=context, bos_token_id=None,
                         pad_token_id=0 if pad else None, eos_token_id=1 if eos else None)  # fmt: skip
    harness.policy.save_policy(common.Policy(LlamaForCausalLM(config), tokenizer, [1]), folder)
    return str(folder)


def weights_of(folder: str | Path) -> torch.Tensor:
    """All weights of a saved policy, in one row."""
    return torch.cat([x.flatten() for _, x in sorted(load_file(Path(folder) / "model.safetensors").items())])


def records(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict]:
    """The records of its training steps."""
    return [record for record in records(folder) if "loss" in record]


def outcome(folder: Path) -> list[bytes]:
    """What a run leaves that depends on its arguments alone."""
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "policy/model.safetensors")]
