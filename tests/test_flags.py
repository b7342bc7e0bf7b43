"""Every flag of every script, at a value other than its default: it changes what a run does, or is refused."""

import contextlib
import dataclasses
import functools
import importlib
from pathlib import Path

import pytest
import torch
from runs import SCRIPTS, in_process

import common
from harness.run import RunArgs

BASE = "--task arithmetic --levels 1 --steps 2 --k 2 --n 6 --prompts-per-step 4 --eval-n 4 --eval-problems 2".split()
SHARED = {field.name for field in dataclasses.fields(RunArgs)}
VALUES = """
anchor_rate 0.5; baseline value; changed_files; chat --no-chat; clip 0.1; data rows.jsonl; device cuda; epochs 2;
eval_N 3; eval_every 1; eval_n 5; eval_problems 3; experts rows.jsonl; gradient_checkpointing; k 3; N 3;
kl_anneal_steps 5; kl_coef 0.5; kl_coef_end 0.5; kl_delay 1; levels 2; likelihood exact; log_kl; lr 1e-3;
lr_decay --no-lr-decay;
max_grad_norm 1e-3; max_new_tokens 3; micro_batch_tokens 20; model {untrained}; n 8; preset paper; prompts_per_step 8;
resume runs/none; run_name b; sample_rows 3; sandbox rlimits; save_every 1; seed 1; show_prompt; show_samples 1;
steps 3; estimator mean; task sums; temperature 0.8; tensorboard; track; value_lr 1e-2;
verifier learned --verifier-problems 32; verifier_lr 1e-2; verifier_model {untrained}; verifier_problems 16;
warm_up_steps 2
"""
VALUES = {name: value for name, *value in map(str.split, VALUES.split(";"))}
# These do nothing in BASE, and neither is there what the hub, a GPU, or another library would have to bring.
REFUSED = """anchor_rate baseline changed_files chat clip data device experts kl_anneal_steps kl_delay resume sandbox
tensorboard track value_lr verifier_lr verifier_model verifier_problems""".split()


def flags_of(script: str) -> list[str]:
    return [field.name for field in dataclasses.fields(importlib.import_module(script[:-3]).Args)]


@pytest.fixture(scope="module")
def done(skilled, tmp_path_factory):
    """done(script, *flags) -> everything that a run left, printed and did in memory, or its complaint, a text."""

    @functools.cache
    def result(script, *flags):
        work, name = [], ["--model", skilled, "--run-name", "a"]
        with contextlib.chdir(tmp_path_factory.mktemp("flags")), pytest.MonkeyPatch.context() as patch:

            def note(module, name, what):
                function = getattr(module, name)
                patch.setattr(module, name, lambda *args: work.append((name, what(*args))) or function(*args))

            recomputes = lambda model: any(getattr(x, "gradient_checkpointing", False) for x in model.modules())  # noqa: E731
            note(common, "response_states", lambda model, prompts, *_: (len(prompts), recomputes(model)))
            note(common, "sampled_rows", lambda policy, prompts, *_: len(prompts))
            note(torch, "save", lambda *_: None)
            patch.setattr("harness.policy.disagreement", lambda policy: "")  # once, for the first run alone
            ended = in_process(script, *BASE, *name, *flags)
            if ended.returncode:
                assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
                return ended.stderr
            kept = ("metrics.jsonl", "model.safetensors")
            left = {str(x): x.read_bytes() for name in kept for x in sorted(Path("runs").rglob(name))}
            return left, ended.stdout, work

    return result


def cases():
    for script in SCRIPTS:
        for name in flags_of(script):
            slow = script != SCRIPTS[0] and name in SHARED  # the harness has them, for all scripts alike
            yield pytest.param(script, name, marks=pytest.mark.slow if slow else [], id=f"{script[:-3]}-{name}")


def command_of(name: str, untrained: str) -> list[str]:
    value = [word.format(untrained=untrained) for word in VALUES[name]]
    return value if value[:1] and value[0].startswith("--no-") else [f"--{name.replace('_', '-')}", *value]


@pytest.mark.parametrize("script, name", [*cases()])
def test_a_flag_changes_the_run_or_is_refused(script, name, done, untrained):
    plain, other = done(script), done(script, *command_of(name, untrained))
    assert not isinstance(plain, str), plain
    refused = name in REFUSED or (name == "log_kl" and script == "majority_pg.py")  # whose KL is logged anyway
    if refused and not (name == "device" and torch.cuda.is_available()):
        assert isinstance(other, str), "it did something after all: mend this list"
        assert len([line for line in other.splitlines() if line.startswith("error:")]) == 1
    else:
        assert not isinstance(other, str), other
        assert other != plain


RL, SFT = "bon_rl.py", "bon_sft.py"
OF_USE = [  # the others: test_wiring.py, test_run.py, test_learned.py, by value
    (RL, "--kl-coef 0.5 --kl-coef-end 2 --kl-anneal-steps 2", "--kl-delay 0"),
    (RL, "--verifier learned --verifier-problems 32", "--verifier-lr 1e-2"),
    (RL, "--estimator mean", "--baseline value"),
]


@pytest.mark.parametrize("script, base, flags", OF_USE)
def test_where_a_flag_is_of_use_it_changes_the_run(script, base, flags, done):
    plain, other = done(script, *base.split()), done(script, *base.split(), *flags.split())
    assert not isinstance(plain, str) and not isinstance(other, str) and other != plain


@pytest.mark.parametrize(
    "script, flags, why",
    [
        (SFT, "--N 1 --n 4", "--n does nothing without --N 2 or more"),
        (SFT, "--N 1 --n None --likelihood exact", "--likelihood does nothing without --N 2 or more"),
        (RL, "--verifier learned --verifier-model x --verifier-lr 1", "--verifier-lr does nothing without a verifier"),
        (RL, "--verifier-model x", "--verifier-model does nothing without --verifier learned; leave it out"),
        (RL, "--kl-coef 1 --log-kl", "--log-kl does nothing without --kl-coef 0: else the KL is logged anyway"),
        (RL, "--kl-coef 1 --kl-delay 5", "--kl-delay does nothing without --kl-coef-end"),
        ("pass_at_k_pg.py", "--sandbox landlock", "--sandbox does nothing without a task that runs programs"),
    ],
)
def test_why_a_flag_is_refused(script, flags, why, done):
    assert done(script, *flags.split()).startswith(f"error: {why}")


def test_a_presets_values_are_not_the_users(done):
    """The preset has a learning rate of the value network, which `--baseline loo` leaves without use."""
    assert not isinstance(done(RL, "--preset", "paper", "--estimator", "mean", "--baseline", "loo"), str)
