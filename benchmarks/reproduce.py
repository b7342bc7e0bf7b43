"""The papers' claims (B1-B3, M1-M5, C1-C5) and questions neither paper asks: predicted, then measured.

    python benchmarks/reproduce.py               # 5 seeds of 28 settings
    python benchmarks/reproduce.py --quick       # 3 seeds of three settings, which the whole takes over
    python benchmarks/reproduce.py --baselines   # E4: 5 seeds of recipes/baselines.py and of k8
    python benchmarks/reproduce.py --report      # runs nothing: the tables of what there is

The task is `suspects`. Every number comes from RUNS, commands that can also be run by themselves. Seed s varies
everything: tiny's own warm start, the order of problems, the samples. The policy is then evaluated without sampling
(exact.py) on fixed prompts, 348 held-out ones and 350 of training, all levels counting alike. predictions.json, which
optima.py wrote before the runs, has what exact theory says of each comparison. A stopped run is resumed, a finished one
is not made again. Prints the tables, and writes results.json and the figure of policies and frontier to --out.
"""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import claims
import exact  # first: it puts the repository on the path
import frontier
import measure
import numpy as np
import optima
import torch
from measure import markdown
from optima import level_weights
from tqdm import tqdm

import bandit
import common
from harness.policy import encode_prompts, load_policy, tiny_policy_folder
from harness.report import mean_and_interval
from verifiers import BadInput, learned
from verifiers.suspects import MOST, listed, posterior, suspect

FORMALITY = "--eval-every 0 --eval-problems 1 --eval-n 32"  # the scripts' own evaluation, by sampling, is not used
SHARED = f"--steps 150 --prompts-per-step 16 --lr 2e-4 {FORMALITY}"
PASS = f"pass_at_k_pg.py {SHARED}"  # 16 samples to a prompt
EARLY = PASS.replace("--steps 150", "--steps 50")  # for variance.py: less far on the way
BON = f"bon_rl.py {SHARED} --N 8 --n 16"
VERIFIER_PROBLEMS = 2000
LEARNED = f"{BON} --verifier learned --verifier-problems {VERIFIER_PROBLEMS}"
VOTE = f"majority_pg.py {SHARED} --k 8"
SFT = f"bon_sft.py {SHARED} --eval-N 8"

# Each is run for every seed s, with --model tiny-s --seed s behind.
RUNS = {
    "mean": f"{PASS} --k 4 --estimator mean",  # with n = 16 it is the same for every k
    **{f"k{k}": f"{PASS} --k {k}" for k in (2, 4, 8, 16)},
    "mean-50": f"{EARLY} --k 4 --estimator mean",
    "k8-50": f"{EARLY} --k 8",
    "k32": f"{PASS} --k 32 --prompts-per-step 8",
    "learned-exact": LEARNED,
    **{f"k{k}-biased": f"{PASS} --k {k} --estimator biased" for k in (2, 4, 8, 16)},
    "maxrl": f"{PASS} --k 16 --estimator maxrl",
    "k8-n8": f"{PASS} --k 8 --n 8 --prompts-per-step 32",  # n = k, as many samples a step
    "hard-mean": f"{PASS} --k 8 --estimator mean --levels 6 7 8",
    "hard-k8": f"{PASS} --k 8 --levels 6 7 8",
    "learned-mean": f"{LEARNED} --estimator mean",
    **{
        f"vote-{estimator}-{beta}": f"{VOTE} --estimator {estimator} --kl-coef {beta}"
        for beta, estimator in itertools.product((0.3, 0.5, 0.8), ("mean", "biased"))
    },
    "rlb-p": f"{BON} --estimator rlb-p",
    "variational": f"bon_rl.py {SHARED} --N 8 --n 24 --prompts-per-step 11 --estimator variational",  # 3 groups of N
    "sft": f"{SFT} --N 1",
    "bon-sft": f"{SFT} --N 8 --likelihood exact",
}
BASELINES = {  # beside "k8", which is u
    f"baseline-{name}": f"{PASS} --k 8 --estimator {measure.ROOT / 'recipes' / 'baselines.py'}:{name}"
    for name in ("b", "others", "posterior")
}
BASE = f"pass_at_k_pg.py --steps 0 --k 4 {FORMALITY}"  # first of all: it leaves tiny-s in the cache
QUICK = ("mean", "k8", "sft")  # for what they decide in five minutes: M4, C4, some of C2, C3, C5
BEST_MEAN = "maj@8 of the highest mean reward at this KL"  # a metric of the vote runs

# Policies of the frontier: name in the figure, and the number of tries that they are trained for.
POLICIES = {
    "base": ("base", None), "mean": ("mean", 1), **{f"k{k}": (f"unbiased, k = {k}", k) for k in (2, 4, 8, 16, 32)},
    **{f"k{k}-biased": (f"biased, k = {k}", k) for k in (2, 4, 8, 16)}, "maxrl": ("MaxRL, n = 16", None),
    "rlb-p": ("BoN-RLB(P), N = 8", 8), "variational": ("BoN-RL variational, N = 8", 8),
    "sft": ("SFT", None), "bon-sft": ("BoN-SFT, N = 8", 8),
}  # fmt: skip


@dataclass
class Args:
    quick: bool = False  # three seeds of three settings
    baselines: bool = False  # the baselines of pass@k alone
    seeds: int = 5  # 2 to 10
    jobs: int = 2  # runs at a time, each on one thread
    out: Path = Path("runs/reproduce")  # folder of the runs, their logs and the results
    report: bool = False  # run nothing, report what there is
    publish: bool = False  # copy results.json here, tables into README.md and docs/results.md, the figure into .github


class Seed(claims.Source):
    """What the runs of one seed came to."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed = out, seed

    def at(self, name: str, metric: str, levels: Sequence[int] = (), where: str = "held-out") -> float:
        path = run_folder(self.out, name, self.seed) / "exact.json"
        if not path.exists():
            raise KeyError(name)
        values = json.loads(path.read_text())[where][metric]
        return sum(values[str(x)] for x in levels) / len(levels) if levels else values["all"]

    def votes_at_equal_kl(self, beta: float) -> float:
        """maj@8 along mean training is known at the base policy and at three values of beta. Between them the distance
        to the exact frontier, the best mean reward at each KL, is interpolated: maj@8 bends too much for that."""

        def point(name: str) -> tuple[float, float]:
            maj, kl, best = (self.at(name, metric) for metric in ("maj@8", "kl", BEST_MEAN))
            return kl, maj - best

        path = sorted([(0.0, 0.0), *(point(f"vote-mean-{other}") for other in (0.3, 0.5, 0.8))])
        kl, distance = point(f"vote-biased-{beta}")
        return distance - float(np.interp(kl, *zip(*path)))


@cache
def verifier_metrics(model: str, seed: int) -> dict[str, dict[str, float]]:
    """What a seed's learned verifier makes of 64 samples of a policy to each held-out prompt: metric -> level.

    bon@N over all N-subsets, with q in place of the hidden answer; misfit@N, the share of winners among N that are not
    listed; AUC within problems, of the verifier and of q on the very same samples. It is sampled, unlike all else,
    because a verifier also scores what is not listed, and may like it best.
    """
    task, problems = exact.the_task(), optima.problems_of()
    texts, weights = [problem.prompt for problem in problems], level_weights(problems)
    tiny = tiny_policy_folder(task, seed)
    (folder,) = tiny.parent.glob(f"{tiny.name}-verifier-*-p{VERIFIER_PROBLEMS}-*")  # runs leave it in the cache
    policy, verifier = load_policy(model, task, "cpu"), learned.load_verifier(str(folder), task)
    encoded = encode_prompts(policy, task, problems, task.max_new_tokens)
    rollouts = common.sample(policy, encoded, 64, task.max_new_tokens, generator=torch.Generator().manual_seed(seed))
    responses = common.decode(policy, rollouts)
    place = [{name: i for i, name in enumerate(listed(text))} for text in texts]
    place = torch.tensor([[of.get(suspect(x), MOST) for x in row] for of, row in zip(place, responses)])  # (P, 64)
    misfit, scores, q = place == MOST, verifier.score(texts, responses), posterior(texts)
    chance = torch.nn.functional.pad(q, (0, 1)).gather(-1, place)  # (P, 64): of being right
    metrics = {f"bon@{N}": common.best_of_k(scores, chance, N) for N in optima.TRIES}
    metrics |= {f"misfit@{N}": common.best_of_k(scores, misfit.double(), N) for N in optima.TRIES}
    result = exact.by_level(metrics, problems)
    for name, by in (("AUC", scores), ("AUC of q", chance)):
        auc = [[learned.auc(s, (row == y).double()) for y in range(MOST)] for s, row in zip(by, place)]
        auc = torch.tensor(auc).double()  # (P, 8): nan where not both right and wrong samples
        share = weights.unsqueeze(-1) * q * auc.isfinite()
        result[name] = {"all": ((share * auc.nan_to_num()).sum() / share.sum()).item()}
    return result


def evaluation(name: str, seed: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Exact metrics of a finished run's policy: where -> metric -> level -> value.

    where: "held-out" and "training" prompts; "T = 0.7" and "T = 1.3", the temperatures, of base and k8; "before", the
    base policy's where a verifier selects.
    """
    base = f"tiny-{seed}"
    model = base if name == "base" else str(folder / "policy")
    result = {"held-out": exact.evaluation(model, base), "training": exact.evaluation(model, base, False, votes=())}
    if name in ("base", "k8"):
        result |= {f"T = {T}": exact.evaluation(model, base, True, T, ()) for T in (0.7, 1.3)}
    if name.startswith("vote"):  # the frontier keeps what lies elsewhere where it is in the base policy
        q, weights, _ = optima.held_out()
        base_pi = exact.log_probs(base).exp()  # (P, 8)
        fits = base_pi.sum(-1, keepdim=True)  # (P, 1)
        kl = result["held-out"]["kl"]["all"]
        best = fits * optima.mean_kl_policy_at(q, weights * fits.squeeze(-1), base_pi / fits, kl)  # (P, 8)
        result["held-out"] |= exact.by_level({BEST_MEAN: optima.maj_at_k(q, best, 8)}, optima.problems_of())
    if name.startswith("learned"):
        result["before"] = verifier_metrics(base, seed)
        result["held-out"] |= verifier_metrics(model, seed)
    return result


# --- runs -------------------------------------------------------------------------------------------------------------
def command(name: str, seed: int | str = "S") -> str:
    """The command of a run."""
    flags = BASE if name == "base" else (RUNS | BASELINES)[name]
    return f"{flags} --model tiny-{seed} --seed {seed}"


def run_folder(out: Path, name: str, seed: int, words: str | None = None) -> Path:
    """out/runs/NAME-sSEED-HASH, with the hash of the command, or of `words`; exact.json in it is written last."""
    words = (words or command(name, seed)).replace(f"{measure.ROOT}/", "")  # wherever the repository lies
    digest = hashlib.sha256(words.encode()).hexdigest()[:6]
    return out / "runs" / f"{name}-s{seed}-{digest}".replace(" ", "-")


class Runs:
    """Makes runs, several at a time. A failure is kept in `failed` and stops no other. What is run, in which stages,
    when it is done and what is kept of it are methods, which real_model.py replaces."""

    command, evaluation = staticmethod(command), staticmethod(evaluation)

    def __init__(self, out: Path, names: Sequence[str], seeds: Sequence[int], jobs: int):
        self.out, self.names, self.seeds, self.jobs = out, names, seeds, jobs
        self.processes, self.stopping, self.failed, self.evaluating = set(), False, [], threading.Lock()

    def folder(self, name: str, seed: int) -> Path:
        return run_folder(self.out, name, seed, self.command(name, seed))

    def done(self, name: str, seed: int) -> bool:
        return (self.folder(name, seed) / "exact.json").exists()

    def keep(self, name: str, seed: int, folder: Path) -> None:
        """Evaluate a finished run, and leave what marks it as done."""
        (folder / "exact.unfinished").write_text(json.dumps(self.evaluation(name, seed, folder)))
        os.replace(folder / "exact.unfinished", folder / "exact.json")

    def stages(self) -> list[list[tuple[str, int]]]:
        """(name, seed) of all runs. A stage waits for the one before."""
        return [[(name, seed) for seed in self.seeds for name in names] for names in (["base"], self.names)]

    def make(self, name: str, seed: int) -> None:
        """Run, or resume, and evaluate what is not done yet of one run."""
        folder = self.folder(name, seed)
        if self.done(name, seed) or self.stopping:
            return
        script, *flags = shlex.split(self.command(name, seed))
        log, last = self.out / "logs" / f"{folder.name}.txt", folder / "curves.png"  # what a script writes last
        if not last.exists():
            resume = (folder / "args.json").exists()
            flags = ["--resume", f"runs/{folder.name}"] if resume else [*flags, "--run-name", folder.name]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
            with open(log, "a") as file:
                process = subprocess.Popen(
                    [sys.executable, measure.ROOT / script, *flags], cwd=self.out, stdout=file, stderr=file,
                    stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                )  # fmt: skip
                self.processes.add(process)
                process.wait()
                self.processes.discard(process)
        if last.exists() and not self.stopping:
            with self.evaluating:  # loading a model is not for several threads
                self.keep(name, seed, folder)
            (folder / "checkpoint.pt").unlink(missing_ok=True)  # it is not to be resumed any more
        elif not self.stopping:
            self.failed.append(f"{folder.name}: see {log}")

    def make_all(self) -> None:
        """All of them, seed by seed, warm starts first. On Ctrl-C the runs save what they have, and BadInput says how
        to go on."""
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        stages = self.stages()
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(total=sum(map(len, stages)), unit="run") as bar:
            try:
                for stage in stages:
                    for future in [pool.submit(self.make, *job) for job in stage]:
                        future.result()
                        bar.update()
                        bar.set_postfix(failed=len(self.failed))
            except BaseException as error:
                self.stopping = True
                for process in list(self.processes):
                    process.terminate()  # a run in training saves first
                if isinstance(error, KeyboardInterrupt):
                    raise BadInput(f"stopped; the same command goes on with what is in {self.out}") from None
                raise


# --- results ----------------------------------------------------------------------------------------------------------
def over_seeds(out: Path, seeds: int, value: Callable[[Seed], float | list[float]]) -> np.ndarray:
    """`value` of each seed whose runs are done, (seeds,) or (seeds, m)."""
    values = []
    for seed in range(seeds):
        with suppress(KeyError):
            values.append(value(Seed(out, seed)))
    return np.array(values)


def verdict(mean: float, ci: float) -> str:
    return "holds" if mean > ci else "does not" if mean < -ci else "not decidable"


def row_of(claim: str, what: str, mean: float, ci: float, predicted: float | None, **more) -> dict:
    """A row of results.json. The share of a predicted change below .005 would say nothing."""
    share = mean / predicted if predicted and abs(predicted) >= 0.005 else None
    row = {"claim": claim, "what": what, "predicted": predicted, "mean": mean, "ci95": ci, "share": share}
    return row | {"verdict": verdict(mean, ci)} | more


def bandit_rows() -> list[dict]:
    """B1-B3 of bandit.py over 1000 seeds, against both readings of its baseline."""
    a, *others = (bandit.trajectory(bandit.Args(), name) for name in ("unbiased", "mean x k", "mean"))
    at_kl = partial(bandit.mean_at_kl, grid=torch.ones(1, dtype=torch.float64))  # (steps + 1, 3, seeds) -> (1, groups)
    compared = [
        ("B1", "{} minus unbiased, mean reward at step 20", lambda b: (b - a)[20, 0]),
        ("B2", "unbiased minus {}, mean reward at KL 1", lambda b: (at_kl(a) - at_kl(b))[0]),
        ("B3", "unbiased minus {}, max@4 at step 400", lambda b: (a - b)[400, 1]),
    ]
    return [
        row_of(claim, what.format(name), *mean_and_interval(change(b)), None, headline=name == "mean x k", seeds=1000)
        for claim, what, change in compared for name, b in zip(("mean x k", "mean"), others)
    ]  # fmt: skip


def claim_rows(out: Path, seeds: int) -> list[dict]:
    """The rows of all claims whose runs are done for two seeds or more."""
    saved, compared = json.loads(optima.PREDICTIONS.read_text())["claims"], claims.claims()
    predictions, rows = {(row["claim"], row["what"]): row["predicted"] for row in saved}, []
    first = {claim: what for claim, what, _ in reversed(compared)}
    for claim, what, value in compared:
        values = over_seeds(out, seeds, value)
        if len(values) > 1:
            mean, ci = map(float, mean_and_interval(values))
            more = {"headline": what == first[claim], "seeds": len(values), "values": values.tolist()}
            rows.append(row_of(claim, what, mean, ci, predictions[claim, what], **more))
    return rows


def policy_rows(out: Path, seeds: int) -> list[dict]:
    """Each policy's own points, [pass@1, pass@8, pass@32] a seed, and where it is trained for k tries: the share of the
    way from the base policy to the best possible pass@k, over held-out and over training prompts, a seed each."""
    rows = []
    for name, (label, k) in POLICIES.items():
        points = over_seeds(out, seeds, lambda seed: [seed.at(name, f"pass@{j}") for j in (1, 8, 32)])
        row = {"policy": label, "k": k, "points": points.tolist()}
        for where in ("held-out", "training") if k else ():
            problems = optima.problems_of(where == "held-out")
            best = (level_weights(problems) @ exact.the_task().best(problems, k)).item()
            ends = over_seeds(out, seeds, lambda seed: [seed.at(x, f"pass@{k}", (), where) for x in (name, "base")])
            row[where] = [(after - before) / (best - before) for after, before in ends.tolist()]
        if len(points) > 1:
            rows.append(row)
    return rows


def cells(row: dict) -> list[str]:
    """predicted, measured, share and verdict of a row."""
    predicted = "-" if row["predicted"] is None else f"{row['predicted']:+.3f}"
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return [predicted, f"{row['mean']:+.3f} ± {row['ci95']:.3f}", share, row["verdict"]]


def tables(result: dict) -> dict[str, str]:
    """The markdown tables of results.json, by the names of their markers: every comparison; one a claim; policies."""
    every, short, policies = [], [], []
    for claim, group in itertools.groupby(result["rows"], key=lambda row: row["claim"]):
        page, seen = claims.PAPERS[claim]
        for place, row in enumerate(group):
            what = f"**{row['what']}**" if row["headline"] else row["what"]
            every.append(["" if place else f"**{claim}** {seen} [({page})]({page})", what, *cells(row)])
            if row["headline"] and claim[0] != "E":  # what no paper claims stands in the long table alone
                short.append([claim, seen, row["what"], *cells(row)])
    for row in result["policies"]:
        points = np.array(row["points"])  # (S, 3)
        below = [frontier.below_frontier(frontier.curve(k), points[:, [0, i]]) for i, k in ((1, 8), (2, 32))]
        way = (measure.interval(row[where], ".0%") if row["k"] else "-" for where in ("held-out", "training"))
        policies.append([row["policy"], *map(measure.interval, points.T), *way, *map(measure.interval, below)])
    head = ["compared here", "predicted", "measured ± 95%", "share", "verdict"]
    passes, way = ["pass@1", "pass@8", "pass@32"], "gap to the best at its own k closed"
    below = [f"below the frontier of pass@{k}" for k in (8, 32)]
    return {
        "claims": markdown(["claim", *head], every),
        "claims-short": markdown(["", "what the papers saw", *head], short),
        "policies": markdown(["policy", *passes, way, "the same, training prompts", *below], policies),
    }


def main(args: Args) -> None:
    if not 2 <= args.seeds <= 10 or args.jobs < 1:
        raise BadInput("--seeds must lie between 2 and 10, --jobs be at least 1")
    if args.publish and (args.quick or args.baselines):
        raise BadInput("--publish is for all of it: leave --quick and --baselines out")
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, machine = 3 if args.quick else args.seeds, measure.machine(1)
    names = ["k8", *BASELINES] if args.baselines else [*(QUICK if args.quick else RUNS)]
    runs = Runs(args.out, names, range(seeds), args.jobs)
    if not args.report:
        runs.make_all()
    result = {
        "machine": machine, "seeds": seeds, "commands": {name: command(name) for name in ("base", *names)},
        "rows": bandit_rows() + claim_rows(args.out, seeds), "policies": policy_rows(args.out, seeds),
    }  # fmt: skip
    (args.out / "results.json").write_text(measure.records_json(result))
    found = tables(result)
    print("\n\n".join(found.values()) + "\n")
    points = {row["policy"]: np.array(row["points"]) for row in result["policies"]}
    frontier.save_figure(args.out / "frontier.png", [(f"one try against {k}", k, points) for k in frontier.KS])
    print(f"{args.out}: results.json, frontier.png")
    if runs.failed:
        raise BadInput("these runs failed, their claims lack seeds:\n" + "\n".join(runs.failed))
    if args.publish:
        shutil.copy(args.out / "results.json", measure.ROOT / "benchmarks")
        shutil.copy(args.out / "frontier.png", measure.ROOT / ".github")
        measure.publish(found | {"claims-machine": f"{measure.in_words(machine)}; {seeds} seeds."})


if __name__ == "__main__":
    measure.program(main, Args)
