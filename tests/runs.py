"""Scripts run in this process, a small policy for them to train, and what their runs leave."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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


def idle_flags(args) -> list[str]:
    """The flags among a script's arguments that do nothing there, for which it would stop at once."""
    default = type(args)()
    rules = harness.run.IDLE_WITHOUT.items()
    changed = [(name, used) for name, (_, used) in rules if getattr(args, name, None) != getattr(default, name, None)]
    return [name for name, used in changed if not used(args)]


def in_process(script: str, *flags: str) -> SimpleNamespace:
    """The script run as __main__ in this process, which saves importing torch: returncode, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *(of_script(script, flag) for flag in flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            returncode = 0
        except SystemExit as stop:
            returncode = stop.code
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


# Other processes are forked from this one, which has imported everything: a script's own imports take six seconds.
FORKS = multiprocessing.get_context("fork")


def started(script: Path, *flags: str, cwd: Path, rank: int = 0, size: int = 1, port: int = 0):
    """A process that runs the script as __main__, one of `size`. It writes to `cwd`/out-RANK and err-RANK."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment = os.environ | ({name: str(value) for name, value in place.items()} if size > 1 else {})
    command = [str(script), *(of_script(Path(script).name, flag) for flag in flags)]
    process = FORKS.Process(target=_run_as_main, args=(command, str(cwd), rank, environment))
    process.start()
    return process


def _run_as_main(command: list[str], cwd: str, rank: int, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), command
    torch.set_num_threads(1)
    harness.policy.disagreement, harness.report.save_figure = lambda policy: "", no_figure
    runpy.run_path(command[0], run_name="__main__")


def no_figure(folder: Path, *_) -> None:
    """In place of harness.report.save_figure, which takes as long as the rest of a run here."""
    (folder / "curves.png").touch()


def ended(*processes, cwd: Path, patience: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the processes of a run, once all have ended. As torchrun has it, one that fails
    takes the others with it; the code is its own."""
    failed, until = 0, time.time() + patience
    while any(process.is_alive() for process in processes) and time.time() < until:
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes and not failed:
            failed, until = codes[0], min(until, time.time() + 5)
            [process.terminate() for process in processes]
        time.sleep(0.002)
    hung = [process for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    out, err = ("".join((Path(cwd) / f"{x}-{i}").read_text() for i in range(len(processes))) for x in ("out", "err"))
    assert failed or not hung, f"it hung: {out}\n{err}"
    return failed or max((process.exitcode for process in processes), key=abs), out, err


def in_two_processes(script: Path, *flags: str, cwd: Path, patience: float = 120) -> tuple[int, str, str]:
    """What `ended` says of the script in two processes, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(script, *flags, cwd=cwd, rank=rank, size=2, port=port) for rank in (0, 1)]
    return ended(*both, cwd=cwd, patience=patience)


def torchrun(*command, cwd: Path) -> subprocess.CompletedProcess:
    """The command in two processes, by torchrun itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*launcher, *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def wrapped(folder: Path, script: str, code: str) -> Path:
    """A file of the script's name in `folder` that runs `code` and then the script, for other processes to start."""
    lines = ["import os, runpy, signal, sys", f"sys.path.insert(0, {str(ROOT)!r})", code]
    lines.append(f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')")
    (folder / script).write_text("\n".join(lines))
    return folder / script


def parity(problems, rows) -> Verdict:
    """A verifier that an untrained policy is right by now and then: responses of an odd length earn 1."""
    rewards = torch.tensor([[float(len(response) % 2) for response in row] for row in rows])
    return Verdict(rewards, torch.zeros(rewards.shape, dtype=torch.int64))


def save_untrained(folder: Path, eos: bool = True, pad: bool = True, context: int = 64) -> str:
    """Random weights on characters, 16 wide, saved; never right in arithmetic."""
    tokenizer = harness.policy.tiny_tokenizer()
    if not eos:
        tokenizer.eos_token = None
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=context, bos_token_id=None,
                         pad_token_id=0 if pad else None, eos_token_id=1 if eos else None)  # fmt: skip
    harness.policy.save_policy(common.Policy(LlamaForCausalLM(config), tokenizer, [1]), folder)
    return str(folder)


def taught(folder: str, steps: int, *lessons: tuple) -> str:
    """The folder, with its policy trained on each lesson: a task, problems with solutions, and the weight of each."""
    policy, experts = harness.policy.load_policy(folder, lessons[0][0], "cpu"), []
    for task, problems, weight in lessons:
        prompts = harness.policy.encode_prompts(policy, task, problems, 8)
        rollouts = harness.policy.expert_rollouts(policy, task, prompts, [[problem] for problem in problems])
        experts.append((rollouts, torch.full((len(problems), 1), weight)))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for rollouts, weights in experts:
            common.accumulate_gradient(policy, rollouts, weights)
        optimizer.step()
    harness.policy.save_policy(policy, folder)
    return folder


def records(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict]:
    """Those of its training steps."""
    return [record for record in records(folder) if "loss" in record]


def outcome(folder: Path) -> list[bytes]:
    """What a run leaves that depends on its arguments alone."""
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "policy/model.safetensors")]
