"""What the tests of both engines share: each estimator by the names that the recipes have, and ours."""

from functools import partial

import torch

import bon_rl
import common
import majority_pg
import pass_at_k_pg
from recipes.all_right import metric as pass_hat_k

B, N = 3, 6
BEST_OF_N = "mean", "exact", "variational", "rlb", "rlb-p", "rlb-all"


# name -> function of the recipes, the columns it takes (rewards, votes, scores), and its options
ESTIMATORS = {
    **{f"pass@3 {x}": ("pass_at_k", "r", {"k": 3, "estimator": x}) for x in ("mean", "unbiased", "biased", "maxrl")},
    **{f"maj@3 {x}": ("majority", "rv", {"k": 3, "estimator": x}) for x in ("unbiased", "biased")},
    **{f"bon@2 {x}": ("best_of_n", "rs", {"N": 2, "estimator": x}) for x in BEST_OF_N},
    "pass^3": ("k_sample", "r", {"k": 3}),
}
OURS = {
    "pass_at_k": pass_at_k_pg.advantages,
    "majority": lambda rewards, votes, **options: majority_pg.advantages(votes, rewards, **options),
    "best_of_n": bon_rl.advantages,
    "k_sample": partial(common.k_sample_advantages, pass_hat_k),
}


def by_recipe(recipe, name: str):
    """The advantages of this name as a user of the recipe, a module, writes them."""
    function, _, options = ESTIMATORS[name]
    return partial(getattr(recipe, function), *([pass_hat_k] if function == "k_sample" else []), **options)


def ours(name: str, **columns: torch.Tensor) -> torch.Tensor:
    """The advantages (B, n) of our scripts. columns: r, v and s, (B, n) each."""
    function, takes, options = ESTIMATORS[name]
    A = OURS[function](*(columns[x] for x in takes), **options)
    assert (A != 0).any()
    return A


def rewards_of(n: int = N, seed: int = 0) -> torch.Tensor:
    """(B, n) with ties: the first group has one best, the last is equal throughout."""
    rewards = torch.randint(4, (B, n), generator=torch.Generator().manual_seed(seed)).double() / 4
    rewards[0, 2], rewards[-1] = 1.5, 0.5
    return rewards


def rewards_and_scores(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) each; 0/1 and in one order where a closed form is for these alone."""
    if "rlb" in name:
        rewards = (rewards_of(seed=seed) > 0.4).double()
        return rewards, 3 * rewards - 1
    return rewards_of(seed=seed), torch.randint(4, (B, N), generator=torch.Generator().manual_seed(seed + 1)).double()
