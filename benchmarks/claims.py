"""What the papers claim, and what decides it: of the optima before any run (optima.py), of the runs (reproduce.py)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import measure  # noqa: F401  first: puts the repository on the path

from verifiers.suspects import LEVELS

PAPERS = {  # claim -> the page of docs/ that it belongs to, and what the papers saw, or a question of ours
    "B1": ("bandit.md", "bandit: the mean gradient raises the mean reward fastest (Tang, Fig. 1 left)"),
    "B2": ("bandit.md", "bandit: at equal KL the k-sample gradients have more mean reward (Fig. 1 middle)"),
    "B3": ("bandit.md", "bandit: the k-sample gradients raise pass@k much faster (Fig. 1 right)"),
    "M1": ("pass_at_k.md", "pass@k training has at least the baseline's pass@4 at each level (Fig. 2)"),
    "M2": ("pass_at_k.md", "the gain over the baseline grows with k (Fig. 3)"),
    "M3": ("pass_at_k.md", "hard data: the baseline has more mean reward and less pass@k (Fig. 4)"),
    "M4": ("pass_at_k.md", "code: pass@1 falls, pass@8 to pass@100 rise (Fig. 5)"),
    "M5": ("majority.md", "majority training has more maj@k"),
    "C1": ("best_of_n_rl.md", "BoN-RL-V (a verifier selects) raises Best-of-32 from 26.8 to 30.8% (Chow)"),
    "C2": ("best_of_n_rl.md", "BoN-RL-S (the reward selects) raises pass@32 from 60.0 to 67.0%"),
    "C3": ("best_of_n_rl.md", "BoN-RLB(P) raises pass@16 from 61.6 to 67.1%; plain RL lowers it to 59.8%"),
    "C4": ("best_of_n_sft.md", "plain SFT lowers Best-of-N accuracy, BoN-SFT does not"),
    "C5": ("best_of_n_rl.md", "the gains hold at other N and temperatures"),
    "E1": ("pass_at_k.md", "in neither paper: more prompts, or more samples than k?"),
    "E2": ("pass_at_k.md", "in neither paper: unbiased or biased?"),
    "E3": ("pass_at_k.md", "in neither paper: does a larger k help at many tries?"),
    "E4": ("own.md", "in neither paper: does another baseline of pass@k, whose gradient is the same, learn better?"),
}


class Source(ABC):
    """Where metrics come from: the runs of a seed, or the optima of their objectives."""

    @abstractmethod
    def at(self, name: str, metric: str, levels: Sequence[int] = (), where: str = "held-out") -> float:
        """A metric of the policy of a run, over all levels or the mean over some. Raises KeyError if it is not known.

        where: "held-out", "training", "T = 0.7", "T = 1.3", or "before", the base policy's where a verifier selects."""

    @abstractmethod
    def votes_at_equal_kl(self, beta: float) -> float:
        """maj@8 of majority training minus maj@8 of mean training at the same KL. Raises KeyError as `at`."""

    def gain(self, name: str, metric: str, over: str = "base", levels: Sequence[int] = (), where="held-out") -> float:
        """The metric of one run's policy minus the metric of another run's, or of the base policy."""
        return self.at(name, metric, levels, where) - self.at(over, metric, levels, where)


def claims() -> list[tuple[str, str, Callable[[Source], float]]]:
    """(claim, comparison, its value by a source): positive where it is as the claim says. A claim's first comparison
    decides it. All were fixed before the runs, with predictions.json, which names each by the same words; E4 was added
    after a smaller measurement of it, which docs/own.md has."""
    hard, after = (6, 7, 8), "after minus before"

    def gain(*args, **kwargs):
        return lambda source: source.gain(*args, **kwargs)

    def loss(*args):
        return lambda source: 0 - source.gain(*args)

    def verifier(metric):
        return lambda s: s.at("learned-exact", metric) - s.at("learned-exact", metric, (), "before")

    return [
        ("M1", "pass@4, k = 4 minus mean", gain("k4", "pass@4", "mean")),
        *(("M1", f"the same, level {x}", gain("k4", "pass@4", "mean", (x,))) for x in LEVELS),
        ("M2", "gain at k = 16 minus gain at k = 2",
         lambda source: source.gain("k16", "pass@16", "mean") - source.gain("k2", "pass@2", "mean")),
        *(("M2", f"pass@{k}, k = {k} minus mean", gain(f"k{k}", f"pass@{k}", "mean")) for k in (2, 4, 8, 16, 32)),
        ("M3", "pass@8, k = 8 minus mean, levels 6 to 8", gain("hard-k8", "pass@8", "hard-mean", hard)),
        ("M3", "pass@1, mean minus k = 8, the same", gain("hard-mean", "pass@1", "hard-k8", hard)),
        ("M3", "pass@32, k = 8 minus mean, the same", gain("hard-k8", "pass@32", "hard-mean", hard)),
        ("M4", "pass@8, k = 8 minus mean", gain("k8", "pass@8", "mean")),
        ("M4", "pass@1, mean minus k = 8", gain("mean", "pass@1", "k8")),
        ("M4", "pass@32, k = 8 minus mean", gain("k8", "pass@32", "mean")),
        *(("M5", f"maj@8, majority (beta = {beta}) minus mean at equal KL",
           lambda source, beta=beta: source.votes_at_equal_kl(beta)) for beta in (0.5, 0.3, 0.8)),
        *(("M5", f"{what}, majority minus mean, beta = {x}", gain(f"vote-biased-{x}", metric, f"vote-mean-{x}"))
          for what, metric in (("maj@8", "maj@8"), ("KL", "kl")) for x in (0.3, 0.5, 0.8)),
        *(("C1", f"bon@{N}, BoN-RL-V with N = 8, {after}", verifier(f"bon@{N}")) for N in (8, 1, 2, 4, 16, 32)),
        *(("C1", f"bon@{N}, BoN-RL-V minus plain RL", gain("learned-exact", f"bon@{N}", "learned-mean"))
          for N in (8, 32)),
        ("C1", "AUC within problems, q minus the verifier",
         lambda s: s.at("learned-exact", "AUC of q", (), "before") - s.at("learned-exact", "AUC", (), "before")),
        ("C1", "share of winners that are not listed, after, N = 32 minus N = 8",
         lambda s: s.at("learned-exact", "misfit@32") - s.at("learned-exact", "misfit@8")),
        *(("C2", f"pass@{k}, BoN-RL-S with N = 8, variational, {after}", gain("variational", f"pass@{k}"))
          for k in (16, 8, 32)),
        *(("C2", f"pass@{k}, the same, exact", gain("k8", f"pass@{k}")) for k in (16, 8, 32)),  # pass_at_k_pg.py
        ("C3", f"pass@16, BoN-RLB(P) with N = 8, {after}", gain("rlb-p", "pass@16")),
        ("C3", "pass@16, mean, before minus after", loss("mean", "pass@16")),
        ("C3", "pass@16, BoN-RLB(P) minus mean", gain("rlb-p", "pass@16", "mean")),
        ("C3", "pass@32, BoN-RLB(P) minus mean", gain("rlb-p", "pass@32", "mean")),
        *(("C4", f"bon@{N}, SFT, before minus after", loss("sft", f"pass@{N}")) for N in (32, 16, 8)),
        *(("C4", f"bon@{N}, BoN-SFT with N = 8, {after}", gain("bon-sft", f"pass@{N}")) for N in (32, 16, 8)),
        *(("C4", f"bon@{N}, BoN-SFT with N = 8 minus SFT", gain("bon-sft", f"pass@{N}", "sft")) for N in (32, 16, 8)),
        *(("C5", f"N = 8: pass@{k}, {after}", gain("k8", f"pass@{k}")) for k in (16, 2, 4, 32)),
        ("C5", "N = 2: pass@16", gain("k2", "pass@16")),
        ("C5", "N = 16: pass@2", gain("k16", "pass@2")),
        *(("C5", f"N = 8: pass@8 at temperature {T}", gain("k8", "pass@8", where=f"T = {T}")) for T in (0.7, 1.3)),
        ("E1", "pass@8, k = 8: n = 16 minus n = k at equal samples", gain("k8", "pass@8", "k8-n8")),
        *(("E2", f"pass@{k}, unbiased minus biased", gain(f"k{k}", f"pass@{k}", f"k{k}-biased"))
          for k in (4, 2, 8, 16)),
        ("E3", "pass@32, k = 16 minus k = 4", gain("k16", "pass@32", "k4")),
        *(("E4", f"pass@8, {name} of recipes/baselines.py minus u", gain(f"baseline-{name}", "pass@8", "k8"))
          for name in ("b", "others", "posterior")),
    ]  # fmt: skip
