import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # policies as small as those here gain nothing from more
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for the network, and fail at once where a user's run would ask

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from runs import EXTRA, FLAGS, in_process, save_untrained, steps_of  # noqa: E402

import common  # noqa: E402
import harness.policy  # noqa: E402
from verifiers import arithmetic, load_task  # noqa: E402

FIGURE = harness.report.save_figure


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out of the main test command, see README")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped where there is none")


def pytest_runtestloop(session):
    """Many tests are run by two processes where there are two cores: each takes the next file as it comes by, and the
    second one's reports are told at the end. With a GPU, whose state a fork would break, one process runs all."""
    files = [list(items) for _, items in itertools.groupby(session.items, key=lambda item: item.path)]
    config, done = session.config, session.config._tmp_path_factory.getbasetemp() / "reports.jsonl"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    alone = config.option.collectonly or torch.cuda.is_available() or hasattr(config, "workerinput")  # of pytest-xdist
    if alone or min(cores, len(files)) < 2 or len(session.items) < 300:
        return None
    taken = multiprocessing.get_context("fork").Value("i", 0)
    first = os.getpid()
    if second := (pid := os.fork()) == 0:
        config.pluginmanager.unregister(name="terminalreporter")
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing(), capture.start_global_capturing()  # into files of its own
        config.pluginmanager.register(Reports(config, done))

    def items():
        while True:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(files):
                return
            yield from files[number]

    item = next(mine := items(), None)
    while item is not None and not session.shouldfail and (not second or os.getppid() == first):
        following = next(mine, None)
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    if second:
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    for line in done.read_text().splitlines():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)
    if status:
        pytest.exit(f"the second process ended with {status}", 1)
    return True


class Reports:
    """Writes what a process has to report to a file."""

    def __init__(self, config, path):
        self.config, self.file = config, open(path, "w", buffering=1)

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")


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
    the self-test of a model that has passed it, and a figure. The real ones are `load.__wrapped__`, what is imported
    from harness.report at the top of a file, and what other processes do."""
    load, self_test, passed = functools.cache(arithmetic.load), harness.policy.disagreement, set()

    @functools.wraps(arithmetic.load)
    def as_now(*args):  # a test may have put another verifier in its place
        task = load(*args)
        return dataclasses.replace(task, verify=getattr(arithmetic, task.verify.__name__))

    def once(policy):
        folder = os.path.abspath(policy.model.name_or_path), policy.model.is_activation_checkpointing
        trouble = "" if folder in passed else self_test(policy)
        passed.update([folder] * (not trouble))
        return trouble

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "load", as_now)
        patch.setattr(harness.policy, "disagreement", once)
        patch.setattr(harness.report, "save_figure", lambda folder, *_: (folder / "curves.png").touch())
        yield


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of a small policy that earns nothing."""
    return save_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def skilled(tmp_path_factory):
    """The folder of a small policy that is right now and then on level 1: without rewards no flag of training would
    have an effect to see."""
    folder, task = save_untrained(tmp_path_factory.mktemp("skilled")), load_task("arithmetic")
    policy = harness.policy.load_policy(folder, task, "cpu")
    problems = sorted({p.prompt: p for p in task.train if p.level == 1}.values(), key=lambda p: p.prompt)
    prompts = harness.policy.encode_prompts(policy, task, problems, task.max_new_tokens)
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
    """run(script, *flags) in an empty folder -> returncode, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return in_process


@pytest.fixture(scope="session")
def uninterrupted(skilled, tmp_path_factory):
    """uninterrupted(script) -> the folder of a run that nothing stops, made once and left as it is, and its flags."""
    made = {}

    def result(script):
        if script not in made:
            flags = [*FLAGS, *EXTRA.get(script, []), "--model", skilled]
            with contextlib.chdir(tmp_path_factory.mktemp("uninterrupted")), pytest.MonkeyPatch.context() as patch:
                patch.setattr(harness.report, "save_figure", FIGURE)
                ended = in_process(script, *flags, "--run-name", "whole")
                assert ended.returncode == 0, ended.stderr
                made[script] = Path("runs/whole").absolute(), flags, ended.stdout
            moved = sum(record["grad_norm"] > 0 for record in steps_of(made[script][0]))
            assert moved >= 3, "nothing was learnt: the tests would see nothing"
        return made[script]

    return result
