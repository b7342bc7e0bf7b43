"""One colour an objective, in every figure of this repository: the family of an estimator's name, before its comma."""

COLOURS = {
    "base": "#7f7f7f",
    "mean": "#1f77b4",  # RLOO
    "unbiased": "#d62728",  # pass@k
    "biased": "#ff9896",
    "MaxRL": "#2ca02c",
    "GRPO": "#17becf",
    "RS-GRPO": "#9edae5",
    "pass^k": "#8c564b",
    "leave-two-out": "#e377c2",  # b(k+1)
    "majority": "#9467bd",
    "BoN-RL exact": "#bcbd22",
    "BoN-RL variational": "#b5a000",
    "BoN-RL-V": "#c49c94",
    "BoN-RLB(P)": "#ff7f0e",
    "SFT": "#393b79",
    "BoN-SFT": "#6b6ecf",
}
