"""A run: the flags that scripts share, the command line, batches, evaluation, logs, and checkpoints to resume from."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from common import Policy, Rollouts, decode, sample
from verifiers import TASKS, BadInput, Problem, Verdict, learned, load_task, one_line, with_checked_verdicts

from . import report
from .load_file import load_own_task
from .parallel import all_gather, rank0_only, reduce_metrics, shard, start, stop, world
from .policy import cached_folder, encode_prompts, full_disk_told, load_policy, save_policy, tiny_seed, write_atomically
from .problems import digest_of, evaluation_problems, problems_at, training_batch

Metrics = dict[str, torch.Tensor]  # name -> (P,) values, one a problem
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
MAY_CHANGE = ("resume", "changed_files", "steps", "eval_every", "save_every", "show_samples")  # when a run is resumed


@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share; each adds its algorithm's own."""

    task: str = "suspects"  # problems and verifier, by a name of README's table, or your own FILE:load, see docs/own.md
    steps: int = 150  # optimisation steps; 0 only evaluates
    prompts_per_step: int = 16  # prompts in a step; it samples n times as many responses
    lr: float = 2e-4  # highest learning rate of AdamW
    model: str = "tiny"  # tiny (0.9M parameters, built in), tiny-1 (another seed), or a causal LM: hub id or folder
    data: str | None = None  # a local file or folder with the task's problems (default: the task's own source)
    chat: bool = True  # use the model's chat template, if it has one (--no-chat: a base model that ships one)
    sandbox: str = "auto"  # for tasks that run programs: auto, bubblewrap, landlock or rlimits
    levels: tuple[int, ...] = ()  # levels of difficulty to train and evaluate on (default: all)
    temperature: float = 1.0  # of sampling, in evaluation as well, and of the log-probs that are differentiated
    max_new_tokens: int | None = None  # longest response in tokens (default: the task's)
    lr_decay: bool = True  # the learning rate falls linearly to 0; --no-lr-decay: it stays
    max_grad_norm: float = 1.0  # clip the gradient norm at this value
    sample_rows: int = 1024  # responses sampled at once; halved when memory runs out; changes rounding only
    micro_batch_tokens: int = 16384  # tokens in a training pass; halved when memory runs out; changes rounding only
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    show_prompt: bool = False  # print the first training prompt as the policy reads it, and stop
    show_samples: int = 0  # responses to held-out problems to print, with rewards, at each evaluation
    save_every: int = 50  # steps between checkpoints; only the last is kept
    resume: str | None = None  # runs/NAME: continue from its checkpoint, with its arguments; --steps may be larger
    changed_files: bool = False  # resume although your own file (FILE:NAME) has changed since the run began
    tensorboard: bool = False  # also write the metrics for TensorBoard (an optional dependency)
    track: bool = False  # the same, also sent to Weights & Biases (an optional dependency)
    seed: int = 0  # seed of the order of problems and of sampling; --model tiny-SEED varies the initial policy
    eval_every: int = 100  # steps between evaluations on held-out problems; 0: only before and after training
    eval_n: int = 32  # samples per problem in evaluation, for the metrics at 1, 2, 4, ... tries
    eval_problems: int = 100  # held-out problems per level, at most
    run_name: str | None = None  # folder under runs/ (default: made from the arguments)
    files: typing.ClassVar[dict[str, str]] = {}  # no flag: FILE:NAME -> SHA-256, see `keep_file`


# Flags that do nothing without another flag: the other flag in words, and whether args have it.
KL_MOVES = "--kl-coef-end", lambda args: args.kl_coef_end is not None
TRAINS = "a verifier that is trained here", lambda args: args.verifier == "learned" and not args.verifier_model
IDLE_WITHOUT = {
    "clip": ("--epochs 2 or more", lambda args: args.epochs > 1),
    "log_kl": ("--kl-coef 0: else the KL is logged anyway", lambda args: not args.kl_coef),
    **dict.fromkeys(("kl_delay", "kl_anneal_steps"), KL_MOVES),
    "anchor_rate": ("--kl-coef or --log-kl", lambda args: args.kl_coef or args.kl_coef_end or args.log_kl),
    "value_lr": ("--baseline value", lambda args: args.baseline == "value"),
    "verifier_model": ("--verifier learned", lambda args: args.verifier == "learned"),
    **dict.fromkeys(("verifier_problems", "verifier_lr"), TRAINS),
    "likelihood": ("--N 2 or more", lambda args: args.N != 1),
    "n": ("--N 2 or more", lambda args: not hasattr(args, "likelihood") or args.N != 1),
    "changed_files": ("--resume", lambda args: args.resume),
    "sandbox": ("a task that runs programs", lambda args: TASKS.get(args.task) == "code_tasks"),
}


def run_cli(main: Callable, Args: type, presets: dict[str, dict] = {}) -> None:
    """Parse the command line into Args and run main(args); the user's mistakes end in one line and exit code 2.

    presets: for a script with --preset, the defaults that each one changes, by name."""
    import tyro  # the scripts' estimators can be imported without it

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--resume")
    known = parser.parse_known_args()[0]
    try:
        saved = arguments_of(known.resume, Args) if known.resume else presets.get(known.preset, {})
        files, flags = saved.pop("files", {}), flags_of(Args)
        default = flags(**saved)
        args = tyro.cli(flags, default=default, description=sys.modules[main.__module__].__doc__)
        changed = [f"--{x.replace('_', '-')}" for x in saved if x not in MAY_CHANGE and getattr(args, x) != saved[x]]
        if known.resume and changed:
            raise BadInput(f"{known.resume} keeps its own arguments: leave out {', '.join(changed)}")
        for name in vars(args):
            if getattr(args, name) == "":
                raise BadInput(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
        for name, (other, used) in IDLE_WITHOUT.items():
            if getattr(args, name, None) != getattr(default, name, None) and not used(args):
                raise BadInput(f"--{name.replace('_', '-')} does nothing without {other}; leave it out")
        args.files = files
        start(getattr(args, "device", "cpu"))
        main(args)
        stop()
    except SystemExit:  # --show-prompt and signals end all processes together, at the same place
        stop()
        raise
    except KeyboardInterrupt:
        print("stopped: give the same command again, or --resume the folder that it was writing to", file=sys.stderr)
        sys.exit(130)
    except (BadInput, OSError, torch.OutOfMemoryError) as error:  # OSError: a folder that cannot be written to
        print(f"error: {error}" if world()[0] == 0 else f"error in rank {world()[0]}: {error}", file=sys.stderr)
        sys.exit(2)


def flags_of(Args: type) -> type:
    """The dataclass Args as --help shows it: the script's own flags first, without a default of None (words say it)."""
    import tyro

    def hint(default: str) -> str:
        return "" if default in ("None", "") else f"(default: {default})"

    types, shown = typing.get_type_hints(Args), tyro.conf.arg(help_behavior_hint=hint)
    content = {x: vars(Args)[x] for x in ("__module__", "__firstlineno__") if x in vars(Args)}  # where the words are
    content["__annotations__"] = {x.name: typing.Annotated[types[x.name], shown] for x in dataclasses.fields(Args)}
    fields = sorted(Args.__dataclass_fields__.items(), key=lambda field: field[0] not in Args.__annotations__)
    return type(Args.__name__, (Args,), content | {"__dataclass_fields__": dict(fields)})


def arguments_of(folder: str, Args: type) -> dict:
    """The arguments of the run in this folder. Raises BadInput if there is no run, or one of another command."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        script, processes, _ = saved.pop("script"), saved.pop("processes"), saved.pop("extended_after", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder} is not a run folder: {one_line(error)}") from error
    if script != Path(sys.argv[0]).stem:
        raise BadInput(f"{folder} is a run of {script}.py: resume it by that")
    if processes != int(os.environ.get("WORLD_SIZE", 1)):  # with another number the samples would be others
        raise BadInput(f"{folder} is a run of {processes} process(es): {resume_command(folder, processes)}")
    if "files" not in saved or {*saved} - {"files", *(x.name for x in dataclasses.fields(Args))}:
        raise BadInput(f"{folder} is a run of another version, whose flags and metrics have other names: start anew")
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for x in dataclasses.fields(Args):
        kinds = (int, float) if isinstance(x.default, float) else type(x.default)
        if x.default is not None and not isinstance(value := saved.get(x.name, x.default), kinds):
            raise BadInput(f"{folder}/args.json has {x.name} = {ascii(value)[:40]}: put back what the run wrote")
    return saved


def resume_command(folder: str | Path, processes: int) -> str:
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes} --"
    return f"{launcher} {sys.argv[0]} --resume {folder}"


def keep_file(args, where: str, digest: str) -> None:
    """Keep the SHA-256 of the user's own file "FILE:NAME" with the run's arguments. Raises BadInput if a resumed run
    began with another one, unless args.changed_files."""
    if args.resume and args.files.get(where, digest) != digest:
        what = f"{where} has changed since {args.resume} began"
        if not args.changed_files:
            raise BadInput(f"{what}: put the file back, or go on with this one by --changed-files")
        print(f"{what}: the result is neither file's alone")
    args.files = args.files | {where: digest}


def check_args(args) -> None:
    """Raise BadInput if an argument that several scripts have is out of range."""
    k = "k" if hasattr(args, "k") else "N"
    zeros = "steps eval_every show_samples kl_coef kl_coef_end kl_delay kl_anneal_steps warm_up_steps"
    ones = "prompts_per_step eval_problems epochs save_every verifier_problems micro_batch_tokens sample_rows"
    least = dict.fromkeys(zeros.split(), 0) | dict.fromkeys([k, *ones.split(), "max_new_tokens"], 1)
    least |= dict.fromkeys(("n", "eval_n"), getattr(args, k))
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and not bound <= value < math.inf:  # nan is not
            why = f" (--{k} {bound} takes that many samples)" if name in ("n", "eval_n") else ""
            why += " and finite" * (value == math.inf)
            raise BadInput(f"--{name.replace('_', '-')} must be at least {bound}{why}, not {value}")
    for name in ("lr", "temperature", "max_grad_norm", "clip", "value_lr", "verifier_lr"):
        if not 0 < getattr(args, name, 1) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} must be a positive number, not {getattr(args, name)}")
    if args.prompts_per_step % (size := world()[1]):
        raise BadInput(f"--prompts-per-step must be a multiple of the {size} processes, not {args.prompts_per_step}")
    if args.run_name is not None and not re.fullmatch(r"[\w.=+-]*[\w=+-]", args.run_name):
        raise BadInput(f"--run-name must be a plain folder name, not {args.run_name!r}")
    if (getattr(args, "kl_coef", 0) or getattr(args, "kl_coef_end", None)) and args.n < 2:
        raise BadInput("--kl-coef needs --n 2 or more: the KL's baseline is the other samples")
    for name, size in (("biased", "k"), ("maxrl", "n")):
        if getattr(args, "estimator", "") == name and getattr(args, size) == 1:
            raise BadInput(f"--estimator {name} with --{size} 1 is zero by definition: it is the gradient of 0 samples")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA device here; leave it out")


def check_folder(args) -> None:
    """Raise BadInput if the run cannot write to its folder, or has done more than args.steps already."""
    folder = Path(args.resume or "runs")
    there = folder if os.path.lexists(folder) else Path()  # where it will be made
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise BadInput(f"cannot write to {there.resolve()}: runs are kept in runs/ of the current folder")
    if args.resume and (path := folder / "checkpoint.pt").exists():
        progress = read_checkpoint(path, mmap=True)["progress"]  # the weights are not read yet
        done = progress["step"]
        if args.steps < done:
            raise BadInput(f"{folder} has done {done} steps: --steps must be {done} or more, not {args.steps}")
        for log in (folder / name for name in LOGS):
            if log.exists() and log.stat().st_size < progress.get(log.name, 0):
                raise BadInput(f"{log} is shorter than at the last checkpoint: put a copy in its place, or start anew")


@contextlib.contextmanager
def written_by_one(folder: Path) -> Iterator[None]:
    """Around code that writes to a run's folder. Raises BadInput if another process is doing so."""
    if fcntl is None or world()[0] > 0:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BadInput(f"another process writes to {folder}: wait for its end, or stop it") from error
    except OSError:
        pass  # a file system that locks no folders
    try:
        yield
    finally:
        os.close(descriptor)


def seeded_generator(device: torch.device, *what) -> torch.Generator:
    """A generator seeded by a hash of `what`: purpose, seed, step, rank. On the CPU torch reads 32 bits of a seed."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, what))).getrandbits(63))


def learning_rate(step: int, args) -> float:
    """The learning rate of a step, 1, 2, ... args.steps. It rises linearly over args.warm_up_steps, if the script has
    them, to args.lr. With args.lr_decay it then falls linearly, to reach 0 one step after the last."""
    warm_up = getattr(args, "warm_up_steps", 0)
    fall = (args.steps + 1 - step) / max(args.steps - warm_up, 1) if args.lr_decay else 1.0
    return args.lr * min(step / max(warm_up, 1), fall, 1.0)


def sizes_up_to(n: int, *others: int) -> list[int]:
    """1, 2, 4, ... and n, with the others: the sizes at which metrics are reported."""
    return sorted({2**i for i in range(n.bit_length())} | {n, *others})


class Run:
    """A run: task, problems, policy and optimizer, and a folder under runs/ that can be resumed at its last checkpoint.

    folder: args.json; metrics.jsonl, a line a step and a line an evaluation; samples.jsonl, 4 responses to 50 problems
    of each evaluation with their rewards; timings.jsonl, what depends on the machine; checkpoint.pt. A resumed CPU run
    is bit-identical to an uninterrupted one with the same number of threads.
    progress: plain values and tensors, saved beside the state. All else is a function of arguments and step."""

    def __init__(self, args, *parts):
        """args: RunArgs and the script's own. parts: what the folder's name begins with. Raises BadInput."""
        check_args(args)
        check_folder(args)
        self.args, self.parts, self.stopping, self.writer, self.verify_s = args, parts, 0, None, 0.0
        if ":" in args.task:
            self.task, digest = load_own_task(args.task, args.data)
            keep_file(args, args.task, digest)
        else:
            self.task = load_task(args.task, args.data, args.sandbox)
        self.task = with_checked_verdicts(self.task)
        args.max_new_tokens = self.task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
        self.train = problems_at(self.task.train, args.levels, "training", args.data) if args.steps else []
        test = problems_at(self.task.test, args.levels, "held-out", args.data)
        self.split = "TRAINING" if test == self.train else "held-out"
        if self.split == "TRAINING":
            print("no test.jsonl: the evaluation below is on the TRAINING problems")
        self.test = evaluation_problems(test, args.eval_problems)
        if isinstance(self.train, list) and self.train:  # not made on demand
            keep_file(args, "the training set", digest_of(self.train))
        if args.resume and args.files.get("the test set", digest_of(self.test)) != digest_of(self.test):
            what = f"the held-out problems have changed since {args.resume} began"
            raise BadInput(f"{what}: put them back, or start anew; a table of both would compare nothing")
        args.files = args.files | {"the test set": digest_of(self.test)}
        self.train = self.train or self.test  # --steps 0 trains on nothing and shows a held-out prompt
        self.progress = {"step": 0, "evaluated": None, "skipped_in_a_row": 0, "steps_with_signal": 0}
        if args.tensorboard or args.track:
            try:
                self.SummaryWriter = importlib.import_module("torch.utils.tensorboard").SummaryWriter
                self.wandb = args.track and importlib.import_module("wandb")
            except ImportError as error:
                flag, needs = ("track", "wandb tensorboard") if args.track else ("tensorboard", "tensorboard")
                raise BadInput(f"--{flag} needs what is not installed: pip install {needs}") from error
        # A verifier that cannot run is reported before the model is loaded.
        trial = None if args.show_prompt else self.task.verify(self.test[:1], [[""]])
        self.own_scores = trial is not None and trial.scores is not trial.rewards

    @functools.cached_property
    def policy(self) -> Policy:
        """The policy, loaded when a script first asks for it, after its checks of flags and data. Raises BadInput."""
        args = self.args
        policy = load_policy(args.model, self.task, args.device, args.gradient_checkpointing, args.chat)
        policy.sample_rows, policy.micro_batch_tokens = args.sample_rows, args.micro_batch_tokens
        if args.show_prompt:
            print(policy.tokenizer.decode(encode_prompts(policy, self.task, self.train[:1], args.max_new_tokens)[0]))
            sys.exit(0)
        for problems in (self.train, self.test):
            if isinstance(problems, list):  # not made on demand: a prompt that is too long is refused now
                encode_prompts(policy, self.task, problems, args.max_new_tokens)
        return policy

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.model.parameters(), lr=self.args.lr, weight_decay=0.0, fused=True)

    @functools.cached_property
    def state(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        """What training changes, by name; a script adds its own before it calls `steps`."""
        return {"policy": self.policy.model, "optimizer": self.optimizer}

    def encoded(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The problems' prompts as token ids; see `encode_prompts`."""
        return encode_prompts(self.policy, self.task, problems, self.args.max_new_tokens)

    @functools.cached_property
    def folder(self) -> Path:
        """The run's folder, made when it is first asked for."""
        if self.args.resume:
            return Path(self.args.resume)
        return all_gather(new_run_folder(self.args, self.parts) if world()[0] == 0 else None)[0]

    def reference(self, name: str) -> Policy:
        """A copy of the policy before training, for a KL to it; checkpoints hold it, as --model's files may change."""
        policy = copy.deepcopy(self.policy)
        self.state[name] = policy.model
        return policy

    def use_learned_verifier(self) -> None:
        """Select by a reward model: --verifier-model, or one trained here on labelled samples of the initial policy
        (cached for `tiny`, else kept with the run). Prints its quality on samples for held-out problems."""
        args, policy, task, base = self.args, self.policy, self.task, self.policy.model.name_or_path

        def labelled_samples(problems: Sequence[Problem]):
            """8 responses to each problem, and their rewards."""
            generator = seeded_generator(policy.device, "verifier")
            responses = decode(policy, sample(policy, self.encoded(problems), 8, args.max_new_tokens, 1.0, generator))
            return responses, task.verify(problems, responses).rewards

        def train(folder: Path) -> None:
            chosen = training_batch(self.train, 0, min(args.verifier_problems, len(self.train)), seed=0)
            samples, lr, size = labelled_samples(chosen), args.verifier_lr, policy.micro_batch_tokens
            options = {"lr": lr, "budget": size, "chat": args.chat}
            save_policy(learned.trained_verifier(base, task, chosen, *samples, policy.device, **options), folder)

        if args.verifier_model:
            folder = args.verifier_model
        elif tiny_seed(args.model) is not None:
            levels = ".".join(map(str, args.levels)) or "all"
            recipe = f"lr{args.verifier_lr:g}-p{args.verifier_problems}-t{args.max_new_tokens}-l{levels}"
            own = (digest for name, digest in args.files.items() if ":" in name)  # of a task of the user's
            recipe += "".join(f"-{digest[:12]}" for digest in own)
            folder = cached_folder(f"{Path(base).name}-verifier-{recipe}", train)
        else:
            folder = self.folder / "verifier"
            rank0_only(lambda: write_atomically(folder, train))
        verifier = learned.load_verifier(str(folder), task, policy.device, budget=policy.micro_batch_tokens)
        responses, rewards = labelled_samples(self.test)
        print(learned.quality(verifier.score([problem.prompt for problem in self.test], responses), rewards))
        self.task = learned.with_scores(task, verifier)

    def steps(self, metrics: Callable[[Verdict], Metrics], description: str) -> Iterator[int]:
        """1, 2, ... args.steps, without those done before, with evaluations, a progress bar and checkpoints in between.

        metrics: an evaluation's verdict -> values of each problem, by name. On SIGINT, SIGTERM or SIGHUP the step is
        finished and saved, and the script ends; at a second one it ends at once. Raises BadInput."""
        self.metrics = metrics
        with written_by_one(self.folder):
            yield from self.steps_left(description)

    def steps_left(self, description: str) -> Iterator[int]:
        """What `steps` yields, once no other process writes to the folder."""
        doing, first, last = "writing to", 1, self.args.steps
        if self.args.resume:
            self.restore()
            doing, first = f"resuming at step {self.progress['step']} in", self.progress["step"] + 1
        print(f"{doing} {self.folder}")
        if (self.args.tensorboard or self.args.track) and world()[0] == 0:
            if self.wandb:  # before the writer is made: wandb reads what that writes
                own = {"name": self.folder.name, "config": dataclasses.asdict(self.args), "sync_tensorboard": True}
                self.wandb.init(project="inference-aware-rl", **own)
            self.writer = self.SummaryWriter(self.folder)
        if self.progress["evaluated"] is None:
            print(f"evaluating {len(self.test)} {self.split} problems, {self.args.eval_n} samples each", flush=True)
        self.evaluate_if_due()
        hidden = first > last or world()[0] > 0
        bar_format = "{desc}: {n_fmt}/{total_fmt} [{remaining} left{postfix}]"  # and three metrics fit 80 columns
        self.bar = tqdm(total=last, initial=first - 1, desc=description, bar_format=bar_format, disable=hidden)
        stops = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            stops.append(signal.SIGHUP)
        handlers = {number: signal.signal(number, self.request_stop) for number in stops}
        try:
            for step in range(first, last + 1):
                self.began = time.perf_counter()
                self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.args)
                yield step
                self.progress["step"] = step
                self.evaluate_if_due()
                self.bar.update()
                self.stopping = max(all_gather(self.stopping))  # all stop after the same step
                if step == last or step % self.args.save_every == 0 or self.stopping:
                    self.save()
                if self.stopping and step < last:
                    print(f"stopped after step {step}; to go on:\n{resume_command(self.folder, world()[1])}")
                    all_gather(None)  # torchrun ends all when one has ended: not before the first has saved
                    sys.exit(128 + self.stopping)  # 130 after Ctrl-C, as shells have it
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def request_stop(self, number: int, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = number
        with contextlib.suppress(OSError):  # the terminal may be closed
            tqdm.write("stopping when this step is done (again: at once, losing it)")

    def batch(self, step: int) -> tuple[Sequence[Problem], list[list[int]], torch.Generator]:
        """This process's share of a step: B problems, their prompts as token ids, and a generator to sample by."""
        problems = shard(training_batch(self.train, step - 1, self.args.prompts_per_step, self.args.seed))
        generator = seeded_generator(self.policy.device, "training", self.args.seed, step, world()[0])
        return problems, self.encoded(problems), generator

    def verdict(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Verdict:
        """The verdict on n responses to each of B problems. All processes must call it. `verify_s` becomes its seconds.

        If the verifier raises, the run saves a checkpoint and ends with that error."""
        began, none = time.perf_counter(), torch.zeros(0, self.args.eval_n)
        with self.saved_if_this_fails():
            verdict = self.task.verify(problems, responses) if problems else Verdict(none, none.long())
        self.verify_s = time.perf_counter() - began
        return verdict

    @contextlib.contextmanager
    def saved_if_this_fails(self) -> Iterator[None]:
        """Around the user's code, in all processes. If it raises in one, the first writes a checkpoint, and all end."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        reasons = all_gather(failure and one_line(failure))
        if any(reasons):
            rank0_only(self.save)  # the first process to die takes the others with it
            if failure and not isinstance(failure, BadInput):
                raise failure
            ranks = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
            why = failure or f"the verifier raised in {ranks}"
            go_on = f"--resume {self.folder}{' --changed-files' * any(':' in name for name in self.args.files)}"
            raise BadInput(f"{why} (step {self.progress['step']} is saved: mend it, then {go_on})")

    def log(self, step: int, rollouts: Rollouts | None, verdict: Verdict, record: dict, shown: Sequence[str]) -> None:
        """Append a step's lines to metrics.jsonl and timings.jsonl; the names in `shown` go to the progress bar.

        rollouts: the step's samples, for the speed. Raises BadInput when ten steps in a row were skipped."""
        seconds, tokens = time.perf_counter() - self.began, int(rollouts.mask.sum()) if rollouts else 0
        timings = {"step": step, "seconds": seconds, "verify_s": self.verify_s, "tokens_per_s": tokens / seconds}
        if torch.cuda.is_available():  # timings are the first process's own
            timings["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        record = {"step": step, **reduce_metrics(record, verdict.counts)}
        self.write("metrics.jsonl", record)
        self.write("timings.jsonl", timings)
        values = record | timings
        figures = [(x, f"{values[x]:{'.3g' if abs(values[x]) < 1000 else '.0f'}}") for x in shown if x in values]
        self.bar.set_postfix(dict(figures[:3]), refresh=False)
        self.progress["steps_with_signal"] += record["nonzero_advantage"] > 0
        if step == min(20, self.args.steps) and not self.progress["steps_with_signal"]:
            look = "look at the responses by --show-samples 5, at --max-new-tokens and at the verifier"
            tqdm.write(f"warning: none of the first {step} steps had a signal, and nothing was learnt: {look}")
        self.progress["skipped_in_a_row"] = (self.progress["skipped_in_a_row"] + 1) * record["skipped"]
        if self.progress["skipped_in_a_row"] == 10:
            mend = f"raise --temperature if it is below 1, or look at the weights of --model {self.args.model!r}"
            self.progress |= {"step": step, "skipped_in_a_row": 0}
            rank0_only(self.save)
            why = f"ten steps in a row had a gradient that is not finite and were skipped (step {step} is saved)"
            raise BadInput(f"{why}: lower --lr, {mend}")

    def write(self, name: str, record: dict) -> None:
        """Append a record to a log of the first process, and its numbers to TensorBoard's if it is on."""
        if world()[0] == 0:
            append_json(self.folder / name, record)
        if self.writer:
            scalars = {f"eval/{name}": mean for name, (mean, _) in record.get("eval", {"all": {}})["all"].items()}
            for name, value in (record | scalars).items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step, after the last, and every args.eval_every steps, unless that is done."""
        step, every = self.progress["step"], self.args.eval_every
        if self.progress["evaluated"] == step or not (step in (0, self.args.steps) or (every and step % every == 0)):
            return
        self.progress["before" if step == 0 else "after"] = self.evaluate()

    def evaluate(self) -> Metrics:
        """Log and return the metrics of eval_n samples a held-out problem, from the same random numbers each time."""
        args, (rank, processes), problems = self.args, world(), shard(self.test)
        generator = seeded_generator(self.policy.device, "evaluation", args.seed, rank)
        prompts, T = self.encoded(problems), args.temperature
        samples = prompts and sample(self.policy, prompts, args.eval_n, args.max_new_tokens, T, generator)
        verdict = self.verdict(problems, responses := samples and decode(self.policy, samples))
        verdicts, counts = all_gather(verdict), reduce_metrics({}, verdict.counts)
        # From the ranks' order back to the problems' order.
        order = torch.tensor([i for r in range(processes) for i in range(r, len(self.test), processes)]).argsort()
        parts = ([getattr(v, name) for v in verdicts] for name in ("rewards", "votes", "scores"))
        rewards, votes, scores = (torch.cat(part)[order] for part in parts)  # (P, eval_n) each
        with self.saved_if_this_fails():
            metrics = self.metrics(Verdict(rewards, votes, counts, scores))
        step = self.progress["step"]
        if rank == 0:  # text is escaped in both: a model's must not drive the terminal
            if args.show_samples:
                tqdm.write(f"responses at step {step}:")
            for record in report.samples(problems, responses, verdict.rewards, args.show_samples):
                prompt, response = ascii(record["prompt"][-200:]), ascii(record["responses"][0][:1000])
                tqdm.write(f"{record['rewards'][0]:g}  {prompt} -> {response}")
            for record in report.samples(problems, responses, verdict.rewards, 50):
                append_json(self.folder / "samples.jsonl", {"step": step, **record})
        levels, interval = report.by_level(self.test).items(), report.mean_and_interval
        result = {level: {name: interval(x[at]) for name, x in metrics.items()} for level, at in levels}
        self.progress["evaluated"] = step
        self.write("metrics.jsonl", {"step": step, "eval": result, **counts})
        if counts:
            tqdm.write(f"evaluation at step {step}, events in the verifier: {counts}")
        return metrics

    def save(self) -> None:
        """Write a checkpoint under another name, sync, rename. If that fails, raise BadInput; the last one stays."""
        if world()[0] > 0:
            return
        path, unfinished = self.folder / "checkpoint.pt", self.folder / "checkpoint.unfinished"
        states = {name: x.state_dict() for name, x in self.state.items()}
        try:
            for name in LOGS:
                with open(self.folder / name, "a") as file:
                    os.fsync(file.fileno())
                    self.progress[name] = file.tell()
            with full_disk_told(path), open(unfinished, "wb") as file:
                torch.save({"progress": self.progress, "state": states}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except (OSError, RuntimeError, BadInput) as error:  # RuntimeError: how torch says that it cannot write a file
            unfinished.unlink(missing_ok=True)
            why = str(error).partition("\n")[0]
            raise BadInput(f"cannot write a checkpoint of step {self.progress['step']} to {path}: {why}") from error

    def restore(self) -> None:
        """Load the checkpoint, if there is one, and cut the logs back to it. If args.steps has changed, print what that
        means and note it in args.json. Raises BadInput if --model now has another size."""
        if (self.folder / "checkpoint.pt").exists():
            checkpoint = read_checkpoint(self.folder / "checkpoint.pt")
            self.progress |= checkpoint["progress"]
            try:
                for name, x in self.state.items():
                    x.load_state_dict(checkpoint["state"][name])
            except (KeyError, TypeError, AttributeError) as error:
                what = f"{self.folder / 'checkpoint.pt'} is none of this run ({one_line(error)})"
                raise BadInput(f"{what}: put a copy in its place, or delete it to begin anew") from error
            except (RuntimeError, ValueError) as error:  # of another size
                what = f"--model {self.args.model!r} has changed since {self.folder} began"
                raise BadInput(f"{what}: put it back, or start anew") from error
        done, steps, path = self.progress["step"], self.args.steps, self.folder / "args.json"
        if world()[0] > 0:
            return
        for name in LOGS:
            if (self.folder / name).exists():
                os.truncate(self.folder / name, self.progress.get(name, 0))
        saved = json.loads(path.read_text())
        if steps != saved["steps"] and done:
            saved["extended_after"] = [*saved.get("extended_after", []), done]
            if self.args.lr_decay or getattr(self.args, "kl_coef_end", None) is not None:
                print(f"from step {done + 1} on, schedules follow {steps} steps, no longer {saved['steps']}:")
                print(f"the result is not the one of an uninterrupted run of {steps} steps")
            if (self.folder / "policy").exists():
                shutil.rmtree(self.folder / f"policy-{done}", ignore_errors=True)  # the same one, of an earlier try
                os.rename(self.folder / "policy", self.folder / f"policy-{done}")
        saved |= {name: getattr(self.args, name) for name in MAY_CHANGE[2:]} | {"files": self.args.files}
        path.with_suffix(".unfinished").write_text(json.dumps(saved, indent=2))
        os.replace(path.with_suffix(".unfinished"), path)

    def finish(self, columns: Sequence[str], k: int) -> None:
        """Save the policy, print the table of `columns` (such as "pass@4") before and after, and draw the curves of
        their families ("pass"). A finished run that is resumed comes here at once and writes what is missing."""
        before, after, best = self.progress["before"], self.progress.get("after"), {}
        if self.task.best:
            names = (name for name in before if name.startswith("pass@"))
            best = {name: self.task.best(self.test, int(name.partition("@")[2])) for name in names}
        if self.args.steps and world()[0] == 0:
            write_atomically(self.folder / "policy", lambda folder: save_policy(self.policy, folder))
        print(report.final_table(before, after, best, self.test, columns, self.split))
        if world()[0] == 0:
            families = dict.fromkeys(name.partition("@")[0] for name in columns)
            report.save_figure(self.folder, best, [*families], k, self.split)
        print(f"{self.folder}: metrics.jsonl, samples.jsonl, curves.png{', policy/' if self.args.steps else ''}")


def new_run_folder(args, parts: Sequence) -> Path:
    """Create runs/<name>/ with args.json and return it. The name is --run-name, or the script, `parts` and a hash of
    all arguments; a number is appended if it is taken: no run overwrites another."""
    arguments = {"files": args.files, **dataclasses.asdict(args)}
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:6]
    script = Path(sys.argv[0]).stem
    parts = (re.sub(r"[^\w.=+-]+", "_", str(part).strip("/"))[-60:] for part in (script, *parts, digest))
    name = args.run_name or "-".join(parts)
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # of another run, maybe one that started in this moment
            folder.mkdir(parents=True)
            break
    path, content = folder / "args.json", {"script": script, "processes": world()[1], **arguments}
    try:
        with full_disk_told(path):
            path.write_text(json.dumps(content, indent=2))
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def read_checkpoint(path: Path, mmap: bool = False) -> dict:
    """What `Run.save` wrote, on the CPU. mmap: tensors stay on the disk until used. Raises BadInput if it is torn."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(checkpoint["progress"]["step"] + len(checkpoint["state"]), int):
            raise TypeError("a step is an integer")
        return checkpoint
    except Exception as error:  # pickle, zip and torch raise many types
        why = f"{path} cannot be read ({one_line(error)})"
        raise BadInput(f"{why}: put a copy in its place, or delete it to begin anew") from error


def append_json(path: Path, record: dict) -> None:
    """Append one JSON line. nan and infinity become null, because JSON has no other word for them."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with full_disk_told(path), open(path, "a") as file:
        file.write(json.dumps(finite) + "\n")


def rollout_metrics(policy: Policy, rollouts: Rollouts, verdict: Verdict, advantages: torch.Tensor) -> dict[str, float]:
    """The metrics of a step's rollouts (B, n) that all scripts log, see docs/pass_at_k.md."""
    length = rollouts.mask.sum(-1)  # (B, n)
    last = rollouts.ids.gather(-1, (length - 1).unsqueeze(-1)).squeeze(-1)  # (B, n)
    truncated = ~torch.isin(last, torch.tensor(policy.stop_ids, device=last.device))
    return {
        "reward": verdict.rewards.mean().item(),
        "entropy": -(rollouts.log_probs.sum() / length.sum()).item(),
        "length": length.float().mean().item(),
        "truncated": truncated.float().mean().item(),
        "no_answer": (verdict.votes < 0).float().mean().item(),
        "prompts_without_signal": (advantages == 0).all(-1).float().mean().item(),
    }
