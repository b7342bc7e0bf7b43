"""harness/run.py: random numbers, which are functions of the arguments alone, what is kept in memory, and the logs."""

import itertools
import re
from collections import UserList
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL, steps_of, weights_of

import bon_rl
import harness.run
import pass_at_k_pg
from harness.problems import evaluation_problems, training_batch
from harness.run import learning_rate
from verifiers import Problem, Task, Verdict, arithmetic, load_task

PASS = "pass_at_k_pg.py"


class Lazy(UserList):
    """Problems that are made on demand: no list, and it counts how many were asked for."""

    asked = 0

    def __getitem__(self, i):
        self.asked += 1
        return self.data[i]


@pytest.mark.parametrize("script, asked", [("bon_sft.py", 9), (PASS, 8)])
def test_problems_that_are_made_on_demand_are_not_all_made(script, asked, run, skilled, monkeypatch):
    """Two steps of four problems each ask for eight. bon_sft.py looks first whether one has a solution."""
    task = load_task("arithmetic")
    lazy = Lazy(task.train)
    monkeypatch.setattr(arithmetic, "load", lambda *_: Task(task.name, lazy, task.test, task.verify, max_new_tokens=8))
    run(script, *SMALL, "--levels", "--model", skilled, code=0)
    assert lazy.asked == asked


@pytest.fixture
def begun(skilled, monkeypatch, tmp_path):
    """begun(seed) -> a run of pass_at_k_pg.py that is ready for its first step."""
    monkeypatch.chdir(tmp_path)

    def result(seed=0):
        args = pass_at_k_pg.Args(task="arithmetic", levels=(1,), seed=seed, k=2, n=4, steps=3, prompts_per_step=4,
                                 eval_n=4, eval_problems=5, model=skilled, device="cpu")  # fmt: skip
        run = harness.run.Run(args)
        run.metrics = lambda verdict: {"pass@1": verdict.rewards.mean(-1)}
        return run

    return result


def test_problems_and_random_numbers_are_a_function_of_purpose_seed_step_and_rank(begun, noted, monkeypatch):
    """Seeds 0 and 4 have the same low bits at some places of a word, of which torch reads 32 on the CPU. An evaluation
    has the same numbers at every step. A step has four of the training problems of level 1, the same in each rank."""
    numbers = lambda generator: tuple(torch.rand(8, generator=generator.clone_state()).tolist())  # noqa: E731
    drawn, chosen, evaluated = {}, {}, noted(harness.run, "sample", lambda *args: numbers(args[-1]))
    monkeypatch.setattr(harness.run, "all_gather", lambda value: [value, value])
    for seed, rank in itertools.product((0, 1, 4, 2**32), (0, 1)):
        monkeypatch.setattr(harness.run, "world", lambda: (rank, 2))
        run = begun(seed)
        for step in (1, 2, 7):
            problems, _, generator = run.batch(step)
            drawn[seed, rank, step] = numbers(generator)
            four = tuple(problem.prompt for problem in problems if problem.level == 1)
            assert len(four) == 4 and chosen.setdefault((seed, step), four) == four
        for run.progress["step"] in (0, 2):
            run.evaluate()
        drawn[seed, rank, "evaluation"] = evaluated[-1]
        assert evaluated[-1] == evaluated[-2] and numbers(begun(seed).batch(7)[2]) == drawn[seed, rank, 7]
    assert len({*drawn.values()}) == len(drawn) == 32 and len({*chosen.values()}) == len(chosen) == 12


def test_problems_come_once_a_pass_and_those_of_an_evaluation_from_all_levels():
    batches = [training_batch(range(10), step, 4, seed=0) for step in range(5)]
    assert sorted(sum(batches, [])[:10]) == sorted(sum(batches, [])[10:]) == [*range(10)]
    problems = [Problem(str(i), "", level=i % 3 or None) for i in range(30)]
    chosen = evaluation_problems(problems, 4)
    assert [sum(p.level == level for p in chosen) for level in (1, 2, None)] == [4, 4, 4]
    assert chosen == evaluation_problems(problems, 4)


def test_the_verdict_of_an_evaluation_is_in_the_order_of_the_problems(begun, monkeypatch):
    """One process has all problems; of two, rank r has the problems r, r + 2, ..."""
    run, whole = begun(), []
    assert [problem.level for problem in run.test] == [1] * 5  # --levels 1 holds for the evaluation as well
    run.metrics = lambda verdict: whole.append(verdict.rewards[:, 0].tolist()) or {"pass@1": verdict.rewards.mean(-1)}

    def verify(problems, responses):  # a reward that names its problem
        rows = [[float(run.test.index(problem))] * len(row) for problem, row in zip(problems, responses)]
        return Verdict(torch.tensor(rows), torch.zeros(len(rows), len(rows[0]), dtype=torch.int64))

    run.task.verify = verify
    run.evaluate()
    shares = [verify(run.test[rank::2], [["1"] * 4] * 3) for rank in (0, 1)]
    monkeypatch.setattr(harness.run, "shard", lambda problems: problems[::2])
    monkeypatch.setattr(harness.run, "world", lambda: (0, 2))
    monkeypatch.setattr(harness.run, "all_gather", lambda value: shares if value else [value])  # a failure is None
    run.evaluate()
    assert whole == [[0, 1, 2, 3, 4]] * 2


NO_REWARD = [*SMALL, *"--prompts-per-step 2 --eval-problems 1 --eval-every 0".split()]


@pytest.mark.parametrize("script", [PASS, "majority_pg.py", "bon_rl.py"])
def test_without_a_reward_a_kl_penalty_moves_nothing(script, run, untrained, tmp_path):
    """The policy is its own reference until a reward moves it: ratios, advantages and gradients are exactly 0."""
    flags = [*NO_REWARD, "--steps", "3", "--kl-coef", "0.3", "--max-new-tokens", "3"]
    run(script, *flags, "--model", untrained, "--run-name", "r", code=0)
    values = {"kl": 0, "nonzero_advantage": 0, "prompts_without_signal": 1, "grad_norm": 0}
    assert all({name: record[name] for name in values} == values for record in steps_of(tmp_path / "runs/r"))
    assert torch.equal(weights_of("runs/r/policy"), weights_of(untrained))


def test_a_run_without_a_signal_says_so_once(run, untrained, skilled):
    """It does so after 20 steps, or after its last."""
    warning = "warning: none of the first {} steps had a signal, and nothing was learnt: look at"
    flags = [*NO_REWARD, "--k", "2", "--max-new-tokens", "2"]
    for steps, told in (("21", "20"), ("2", "2")):
        out = run(PASS, *flags, "--steps", steps, "--model", untrained).stdout
        assert out.count(warning.format(told)) == out.count("had a signal") == out.count("--show-samples 5") == 1
    out = run(PASS, *flags, "--steps", "21", "--model", skilled).stdout
    assert "had a signal" not in out and "held-out" in out


def test_the_progress_bar_fits_80_columns(begun, capsys):
    """It shows step, time left, and the first three metrics that are there of those the script names."""
    run = begun()
    run.args.steps, run.args.save_every, run.evaluate, run.save = 12345, 99999, lambda: {}, lambda: None
    steps = run.steps(run.metrics, "variational N=16")
    next(steps)
    record = {"reward": 0.123456, "pass@16": 0.98765, "kl": 12345.6, "nonzero_advantage": 1.0, "skipped": 0}
    verdict = Verdict(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    run.log(1, None, verdict, record, ("reward", "absent", "pass@16", "kl", "tokens_per_s"))
    run.bar.refresh()
    line = capsys.readouterr().err.split("\r")[-1].rstrip()
    assert re.fullmatch(r"variational N=16: 0/12345 \[(\?|[\d:]+) left, reward=0.123, pass@16=0.988, kl=12346\]", line)
    assert len(line) <= 80
    steps.close()


def test_the_learning_rate_rises_before_it_falls():
    """Of the 8 steps behind 4 of warm-up the first has the whole rate, the last an eighth. Without: test_resume.py."""
    args, steps = SimpleNamespace(lr=2.0, steps=12, warm_up_steps=4), (1, 2, 4, 5, 6, 12)
    for args.lr_decay, rates in ((True, [0.5, 1, 2, 2, 1.75, 0.25]), (False, [0.5, 1, 2, 2, 2, 2])):
        assert [learning_rate(step, args) for step in steps] == rates
    assert bon_rl.PAPER["lr_decay"] is False  # Table 2


def test_samples_are_shown_escaped(run, skilled, monkeypatch):
    flags = [*SMALL, "--model", skilled, "--show-samples"]
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "decode", lambda policy, rollouts: [["\x1b[2J\u202e2\0", "5"] * 2] * 2)
        out = run(PASS, *flags, "1", "--steps", "0", "--run-name", "escaped").stdout
    (shown,) = [line for line in out.splitlines() if " -> " in line]
    assert re.fullmatch(r"0  '\d\*\d=' -> '\\x1b\[2J\\u202e2\\x00'", shown)
    text = Path("runs/escaped/samples.jsonl").read_text()
    assert "\x1b" not in text and text.isascii() and len(text.splitlines()) == 2
    for steps, evaluations in (("0", 1), ("2", 2)):
        lines = run(PASS, *flags, "2", "--steps", steps).stdout.splitlines()
        shown = [line.partition(" -> '")[0] for line in lines if " -> '" in line]
        assert len(shown) == 2 * evaluations and shown[0] != shown[1] and f"responses at step {steps}:" in lines
