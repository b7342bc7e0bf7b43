import contextlib
import dataclasses
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # policies as small as those here gain nothing from more
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for the network, and fail at once where a user's run would ask

ROOT = Path(__file__).parent.parent
sys.path[:0] = map(str, (ROOT / "tests", ROOT, ROOT / "benchmarks"))

import pytest  # noqa: E402
import torch  # noqa: E402
from runs import EXTRA, FLAGS, in_process, no_figure, save_untrained, steps_of  # noqa: E402

import common  # noqa: E402
import harness.policy  # noqa: E402
from verifiers import arithmetic, load_task  # noqa: E402

FIGURE = harness.report.save_figure


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out of the main test command, see README")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped where there is none")


@pytest.fixture(autouse=True)
def the_number_of_threads_stays():
    """Runs in this process and in others are compared bit for bit: all must have the same number."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


@pytest.fixture(scope="session", autouse=True)
def runs_are_short():
    """Three quarters of a small run's time go where most tests do not look: into problems that it does not train on,
    the self-test of a model that has passed it, and a figure. The real ones are `load.__wrapped__` and what is imported
    from harness.report at the top of a file. Other processes are forked from this one and do as it does."""
    load, self_test, passed = functools.cache(arithmetic.load), harness.policy.disagreement, set()

    @functools.wraps(arithmetic.load)
    def as_now(*args):  # a test may have put another verifier in its place
        task = load(*args)
        options = getattr(task.verify, "keywords", {})
        return dataclasses.replace(task, verify=functools.partial(arithmetic.verify, **options))

    def once(policy):
        folder = os.path.abspath(policy.model.name_or_path), policy.model.is_activation_checkpointing
        trouble = "" if folder in passed else self_test(policy)
        passed.update([folder] * (not trouble))
        return trouble

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "load", as_now)
        patch.setattr(harness.policy, "disagreement", once)
        patch.setattr(harness.report, "save_figure", no_figure)
        yield


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of a small policy that earns nothing."""
    return save_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def skilled(tmp_path_factory):
    """The folder of a small policy that is right now and then on level 1: without rewards no flag of training would
    have an effect to see. Its context holds the prompts of every task."""
    task = load_task("arithmetic")
    problems = sorted({p.prompt: p for p in task.train if p.level == 1}.values(), key=lambda p: p.prompt)
    folder = save_untrained(tmp_path_factory.mktemp("skilled"), context=4096)
    policy = harness.policy.load_policy(folder, task, "cpu")
    prompts = harness.policy.encode_prompts(policy, task, problems, 8)
    experts = harness.policy.expert_rollouts(policy, task, prompts, [[problem] for problem in problems])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        common.accumulate_gradient(policy, experts, torch.ones(len(problems), 1))
        optimizer.step()
    harness.policy.save_policy(policy, folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, *flags, code=None) in an empty folder -> returncode, stdout, stderr; see `in_process`."""
    monkeypatch.chdir(tmp_path)
    return in_process


@pytest.fixture
def refused(run):
    """refused(script, *flags) -> the one line in which the script says why it cannot do this, and ends with code 2."""

    def line(script, *flags):
        lines = run(script, *flags, code=2).stderr.splitlines()
        (line,) = [line for line in lines if not line.startswith("Writing model")]  # a progress bar of transformers
        return line

    return line


@pytest.fixture
def noted(monkeypatch):
    """noted(owner, name, note) -> a list that gets note(its arguments) at each call of this function."""

    def notes_of(owner, name, note):
        notes, function = [], getattr(owner, name)

        def noting(*args, **options):
            notes.append(note(*args, **options))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, noting)
        return notes

    return notes_of


@pytest.fixture(scope="session")
def uninterrupted(skilled, tmp_path_factory):
    """uninterrupted(script) -> the folder of a run that nothing stops, made once and left as it is, and its flags."""

    @functools.cache
    def result(script):
        flags = [*FLAGS, *EXTRA.get(script, []), "--model", skilled]
        with contextlib.chdir(tmp_path_factory.mktemp("uninterrupted")), pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness.report, "save_figure", FIGURE)
            ended, folder = in_process(script, *flags, "--run-name", "whole", code=0), Path("runs/whole").absolute()
        moved = sum(record["grad_norm"] > 0 for record in steps_of(folder))
        assert moved >= 3, "nothing was learnt: the tests would see nothing"
        return folder, flags, ended.stdout

    return result
