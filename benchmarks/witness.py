"""A second implementation as a witness: the runs `mean` and `k8` of reproduce.py, made by TRL and by us.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/witness.py                 # 5 seeds; ours are taken from runs/reproduce, or made there
    python benchmarks/witness.py --report        # runs nothing: the table of what there is

TRL's run is recipes/trl_k_sample.py with what the command of ours says (reproduce.RUNS): the same policy tiny-S, the
same 64 prompts in each of 60 steps, 16 samples of each at temperature 1, the same verifier, advantages, AdamW (betas .9
and .999, no weight decay, a constant learning rate) and clipping. Sampling, log-probs, loss, backward pass and
optimiser are TRL's, and so are the random numbers. Both policies are evaluated without sampling (exact.py) on all
held-out prompts. If the two do the same, TRL less ours is noise of sampling: small, and its 95% interval over seeds
(Student's t, paired by seed) contains 0. Finished runs are not made again; one that was stopped starts anew.
"""

import datetime
import logging
import multiprocessing
import shlex
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import exact  # first: it puts the repository on the path
import measure
import numpy as np
import reproduce
import torch
import transformers
import tyro
from optima import TRIES

import pass_at_k_pg
from harness.policy import load_policy, save_policy, write_whole
from harness.run import run_cli
from verifiers import BadInput
from verifiers.problems import training_batch

NAMES = ("mean", "k8")  # of reproduce.RUNS
BAR = 0.02  # for the farther end of every interval


@dataclass
class Args:
    seeds: int = 5
    """2 to 10"""
    jobs: int = 2
    """runs at a time, each on one thread"""
    out: Path = Path("runs/witness")
    """folder of TRL's runs and of witness.json"""
    ours: Path = Path("runs/reproduce")
    """folder of our runs, --out of reproduce.py"""
    report: bool = False
    """run nothing, report what there is"""


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Named as ours, by a hash of the command."""
    return out / f"trl-{reproduce.run_folder(out, name, seed).name}"


def train_by_trl(name: str, seed: int, folder: Path) -> None:
    """Train as the command of reproduce.py's run says, and leave the policy in `folder`, whole or not at all."""
    from datasets import Dataset
    from trl import GRPOConfig

    sys.path.insert(0, str(reproduce.ROOT / "recipes"))
    from trl_k_sample import KSampleTrainer, pass_at_k

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    args = tyro.cli(pass_at_k_pg.Args, args=shlex.split(reproduce.command(name, seed))[1:])
    n, task = max(args.k, 16) if args.n is None else args.n, reproduce.lines_task()
    policy = load_policy(args.model, task, "cpu")
    problems = [
        problem for step in range(args.steps)
        for problem in training_batch(task.train, step, args.prompts_per_step, args.seed)
    ]  # fmt: skip
    rows = [{"prompt": problem.prompt, "place": place} for place, problem in enumerate(problems)]

    def verify(completions, place, **_):
        responses = [completions[i : i + n] for i in range(0, len(completions), n)]
        return task.verify([problems[i] for i in place[::n]], responses).rewards.flatten().tolist()

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            scratch, loss_type="dr_grpo", max_steps=args.steps, per_device_train_batch_size=args.prompts_per_step * n,
            num_generations=n, max_completion_length=task.max_new_tokens, temperature=args.temperature, beta=0.0,
            learning_rate=args.lr, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.999, weight_decay=0.0,
            max_grad_norm=args.max_grad_norm, seed=args.seed, shuffle_dataset=False, bf16=False, use_cpu=True,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = KSampleTrainer(
            policy.model, verify, config, Dataset.from_list(rows), processing_class=policy.tokenizer,
            advantages=partial(pass_at_k, k=args.k, estimator=args.estimator),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    write_whole(folder, lambda scratch: save_policy(policy, scratch))


def passes(folder: Path) -> list[float]:
    """pass@1, @2, ... @32 of a policy over all held-out prompts, exactly."""
    problems = reproduce.prompts("held-out")
    metrics = reproduce.by_level(exact.exact_metrics(reproduce.log_probs(str(folder)), problems), problems)
    return [metrics[f"pass@{k}"]["all"] for k in TRIES]


def main(args: Args) -> None:
    if not 2 <= args.seeds <= 10 or args.jobs < 1:
        raise BadInput("--seeds must lie between 2 and 10, --jobs be at least 1")
    machine = measure.describe_machine(1, "trl")
    ours = reproduce.Runs(args.ours, NAMES, range(args.seeds), args.jobs)
    folders = {(name, seed): run_folder(args.out, name, seed) for name in NAMES for seed in range(args.seeds)}
    if not args.report:
        ours.make_all()
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            todo = [pool.submit(train_by_trl, *run, folder) for run, folder in folders.items() if not folder.exists()]
            for done, future in enumerate(todo, 1):
                future.result()
                print(f"TRL: {done} of {len(todo)} runs", flush=True)
    rows, results = [], []
    for name in NAMES:
        seeds = [s for s in range(args.seeds) if folders[name, s].exists()]
        seeds = [s for s in seeds if (reproduce.run_folder(args.ours, name, s) / "exact.json").exists()]
        if len(seeds) < 2:
            continue
        theirs = np.array([passes(folders[name, s]) for s in seeds])  # (seeds, metrics)
        us = np.array([[reproduce.Seed(args.ours, s).at(name, f"pass@{k}") for k in TRIES] for s in seeds])
        for k, a, b in zip(TRIES, us.T, theirs.T):
            mean, ci = map(float, measure.interval(b - a))
            rows.append([name, f"pass@{k}", f"{a.mean():.3f}", f"{b.mean():.3f}", f"{mean:+.4f} ± {ci:.4f}"])
            values = {"seeds": seeds, "ours": a.tolist(), "trl": b.tolist()}
            results.append({"run": name, "metric": f"pass@{k}", **values, "difference": mean, "ci95": ci})
    if rows:
        measure.print_table(["run", "", "ours", "TRL", "TRL less ours ± 95%"], rows)
        end = max(abs(row["difference"]) + row["ci95"] for row in results)
        print(f"farthest end of an interval: {end:.4f}, {measure.verdict(end, BAR, at_most=True)}")
    else:
        print(f"nothing to compare yet: two seeds of a run are not there in both {args.out} and {args.ours}")
    commands = {name: reproduce.command(name) for name in NAMES}
    facts = {"date": datetime.date.today().isoformat(), "commands": commands, "rows": results}
    args.out.mkdir(parents=True, exist_ok=True)
    measure.write_json(str(args.out / "witness.json"), machine, facts)
    if ours.failed:
        raise BadInput("these runs of ours failed, and their seeds are missing:\n" + "\n".join(ours.failed))


if __name__ == "__main__":
    run_cli(main, Args)
