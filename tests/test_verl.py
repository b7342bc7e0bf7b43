"""The recipe for verl, in verl: its registry, its computation of advantages, its loss. In an environment of its own,
as verl wants older transformers than requirements.txt names, and without conftest.py, which wants packages it lacks
(the second line installs what verl imports without asking for it):

    python3 -m venv .venv-verl && . .venv-verl/bin/activate
    pip install verl==0.9.1 torch==2.13.0 tyro==1.0.17 pytest==9.2.0
    pip install TransferQueue==0.1.11 cachetools==8.0.2 uvicorn==0.54.0 fastapi==0.165.0
    python -m pytest -q --noconftest tests/test_verl.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # what conftest.py does elsewhere

pytest.importorskip("verl", reason="verl is not installed: it takes an environment of its own, see the top")
pytestmark = pytest.mark.slow

import numpy as np  # noqa: E402
import verl_k_sample  # noqa: E402
from named_estimators import ESTIMATORS, B, N, by_recipe, ours, rewards_and_scores  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, get_adv_estimator_fn  # noqa: E402
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

from verifiers import votes_from_answers  # noqa: E402

LENGTH = 5


def order_of(rows):
    return torch.randperm(rows, generator=torch.Generator().manual_seed(1))


def batch_of(groups):
    """A batch as verl's trainer has it: rows in a random order, the reward at the last token of responses of 2 to 5.
    groups: for each prompt its samples' rewards, (n,). Two rows of padding, without a token, share a uid."""
    values = torch.cat([*groups, torch.zeros(2)]).float()  # (R,)
    uid = [f"prompt {b}" for b, group in enumerate(groups) for _ in group] + ["pad", "pad"]
    lengths = torch.arange(len(uid)) % 4 + 2
    lengths[-2:] = 0
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(-1)).long()  # (R, T)
    rewards = torch.zeros(mask.shape).scatter(-1, (lengths - 1).clamp(min=0).unsqueeze(-1), values.unsqueeze(-1))
    order = order_of(len(uid))
    tensors = TensorDict({"token_level_rewards": rewards[order], "response_mask": mask[order]}, len(uid))
    return DataProto(tensors, {"uid": np.array(uid, dtype=object)[order.numpy()]}), mask[:-2], order


def in_verl(name, function, groups):
    """The advantages that verl's trainer computes, in our order: (R, T), the padding left out; and the mask, (R, T)."""
    verl_k_sample.register(name, function)
    data, mask, order = batch_of(groups)
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])]
    compute_advantage_for_multi_trajectories(data, keys, name, config=AlgoConfig(adv_estimator=name))
    A = data.batch["advantages"]
    assert torch.equal(data.batch["returns"], A)
    A = A[order.argsort()]
    assert (A[-2:] == 0).all()
    return A[:-2], mask


def reported(name):
    """What the reward function gives of each sample, (B, n), and our advantages of what it means."""
    rewards, scores = rewards_and_scores(name)
    function, votes = ESTIMATORS[name][0], None
    values = rewards
    if function in ("majority", "best_of_n"):
        rewards = (rewards > 0.4).double()
    if function == "majority":
        answers = [[None if i == b else (i * i + b) % 3 for i in range(N)] for b in range(B)]
        rewards.fill_diagonal_(0)  # no answer is not right
        votes = votes_from_answers(answers)
        numbers = [[verl_k_sample.vote(answer) for answer in row] for row in answers]
        values = [[verl_k_sample.packed(bool(r), a) for r, a in zip(*x)] for x in zip(rewards, numbers)]
    elif function == "best_of_n":
        scores = scores.exp().float()  # positive, as the sigmoid of a reward model's would be
        values = [[verl_k_sample.packed(bool(r), s.item()) for r, s in zip(*x)] for x in zip(rewards, scores)]
    # `variational` pairs up samples in the order in which they come, and so do these.
    rows = order_of(B * N + 2)
    order = torch.stack([rows[rows // N == b] % N for b in range(B)])  # (B, n)
    columns = {"r": rewards, "v": votes, "s": scores}
    A = ours(name, **{x: column.gather(-1, order) for x, column in columns.items() if column is not None})
    return torch.as_tensor(values), torch.zeros_like(A).scatter(-1, order, A)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_in_verl_equals_ours_and_its_loss_has_our_gradient(name):
    values, A = reported(name)
    theirs, mask = in_verl(f"test {name}", by_recipe(verl_k_sample, name), list(values))
    expected = (A.flatten().unsqueeze(-1) * mask).float()  # (B, n) -> (R, T)
    torch.testing.assert_close(theirs / N, expected, rtol=0, atol=1e-6)

    log_probs = torch.full(mask.shape, -1.0, requires_grad=True)
    whole = {"loss_agg_mode": "seq-mean-token-sum"}
    config = ActorConfig(strategy="fsdp", rollout_n=N, ppo_micro_batch_size_per_gpu=4, **whole)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=B * N, loss_scale_factor=None)
    for rows in torch.arange(B * N).split(4):  # micro-batches that split groups
        part = (x[rows] for x in (log_probs.detach(), log_probs, theirs, mask))
        compute_policy_loss_vanilla(*part, **whole, config=config)[0].backward()
    torch.testing.assert_close(log_probs.grad, -expected / B, rtol=0, atol=1e-6)


def test_groups_of_several_sizes_each_have_their_own_advantages():
    """As when a rollout failed. A prompt's share in the loss stays 1/B."""
    groups = [torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 1.0, 0, 0, 0])]
    theirs, mask = in_verl("unequal", verl_k_sample.partial(verl_k_sample.pass_at_k, k=3), groups)
    A = torch.cat([verl_k_sample.pass_at_k(group.unsqueeze(0), 3)[0] for group in groups])  # (R,)
    torch.testing.assert_close(theirs, 6 * A.unsqueeze(-1) * mask, rtol=0, atol=1e-6)


def test_verl_imports_an_objective_by_the_name_of_its_module(tmp_path):
    (tmp_path / "my_objective.py").write_text(
        "from verl_k_sample import partial, pass_at_k, register\nregister('pass_at_4', partial(pass_at_k, k=4))\n"
    )
    code = "import verl.trainer.ppo.core_algos as a; print(a.get_adv_estimator_fn('pass_at_4').__module__)"
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "recipes")])
    environment = os.environ | {"PYTHONPATH": paths, "VERL_USE_EXTERNAL_MODULES": "my_objective"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment).endswith(b"verl_k_sample\n")


def test_what_would_be_wrong_is_refused():
    estimator = verl_k_sample.register("refused", verl_k_sample.partial(verl_k_sample.pass_at_k, k=2))
    assert get_adv_estimator_fn("refused") is estimator
    row = torch.ones(1, LENGTH)
    with pytest.raises(ValueError, match="use_kl_in_reward"):
        estimator(row, row, ["a"], AlgoConfig(use_kl_in_reward=True))
    with pytest.raises(ValueError, match="k must lie in 1..n, not k=2 with n=1"):
        estimator(row, row, ["a"], AlgoConfig())
    for right, other in ((True, 0), (False, -1.0), (True, float("inf"))):
        with pytest.raises(ValueError, match="must be positive"):
            verl_k_sample.packed(right, other)
