"""harness/run.py: random numbers, which are functions of the arguments alone, what is kept in memory, and the logs."""

import copy
import itertools
import json
import re
from collections import UserList
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL, steps_of
from safetensors.torch import load_file

import bon_rl
import common
import harness.run
import majority_pg
import pass_at_k_pg
from harness.problems import evaluation_problems, training_batch
from harness.run import learning_rate
from verifiers import Problem, Task, Verdict, arithmetic, load_task

MODULES = {"pass_at_k_pg": pass_at_k_pg, "majority_pg": majority_pg, "bon_rl": bon_rl}


class Lazy(UserList):
    """Problems that are made on demand: no list, and it counts how many were asked for."""

    asked = 0

    def __getitem__(self, i):
        self.asked += 1
        return self.data[i]


@pytest.mark.parametrize("script", ["bon_sft.py", "pass_at_k_pg.py"])
def test_problems_that_are_made_on_demand_are_not_all_made(script, run, skilled, monkeypatch):
    """Two steps of four problems each ask for eight."""
    task = load_task("arithmetic")
    lazy = Lazy(task.train)
    monkeypatch.setattr(arithmetic, "load", lambda *_: Task(task.name, lazy, task.test, task.verify, max_new_tokens=8))
    result = run(script, *SMALL, "--levels", "--model", skilled)
    assert result.returncode == 0, result.stderr
    assert lazy.asked == 8


# --- Random numbers ---


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


def test_random_numbers_are_a_function_of_purpose_seed_step_and_rank(begun, monkeypatch):
    """Seeds 0 and 4 have the same low bits at some places of a word, of which torch reads 32 on the CPU. An evaluation
    has the same numbers at every step."""
    drawn, evaluated, sample = {}, [], common.sample
    numbers = lambda generator: tuple(torch.rand(8, generator=generator.clone_state()).tolist())  # noqa: E731
    monkeypatch.setattr(harness.run, "sample", lambda *args: evaluated.append(numbers(args[-1])) or sample(*args))
    monkeypatch.setattr(harness.run, "all_gather", lambda value: [value, value])
    for seed, rank in itertools.product((0, 1, 4, 2**32), (0, 1)):
        monkeypatch.setattr(harness.run, "world", lambda: (rank, 2))
        run = begun(seed)
        drawn |= {(seed, rank, step): numbers(run.batch(step)[2]) for step in (1, 2, 7)}
        for run.progress["step"] in (0, 2):
            run.evaluate()
        drawn[seed, rank, "evaluation"] = evaluated[-1]
        assert evaluated[-1] == evaluated[-2] and numbers(begun(seed).batch(7)[2]) == drawn[seed, rank, 7]
    assert len({*drawn.values()}) == len(drawn) == 32


def test_problems_are_a_function_of_seed_and_step(begun):
    """Four a step of the training problems of level 1; in a pass over them none comes twice."""
    run, other = begun(0), begun(1)
    batches = [each.batch(step)[0] for each in (run, begun(0), other) for step in (1, 2)]
    prompts = [[problem.prompt for problem in problems] for problems in batches]
    assert prompts[:2] == prompts[2:4] and len({tuple(four) for four in prompts}) == 4
    assert {problem.level for each in (run, other) for problem in each.train} == {1}
    whole = [problem for step in range(1, len(run.train) // 4 + 1) for problem in run.batch(step)[0]]
    assert sorted(map(id, whole)) == sorted(map(id, run.train))


def test_training_batches_see_every_problem_once_a_pass():
    batches = [training_batch(range(10), step, 4, seed=0) for step in range(5)]
    assert sorted(sum(batches, [])[:10]) == sorted(sum(batches, [])[10:]) == [*range(10)]
    assert batches != [training_batch(range(10), step, 4, seed=1) for step in range(5)]


def test_evaluation_problems_are_spread_over_levels():
    problems = [Problem(str(i), "", level=i % 3 or None) for i in range(30)]
    chosen = evaluation_problems(problems, 4)
    assert [sum(p.level == level for p in chosen) for level in (1, 2, None)] == [4, 4, 4]
    assert chosen == evaluation_problems(problems, 4)


# --- The KL and its copy of the policy; its value: test_wiring.py, its coefficient: test_resume.py ---


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_the_policy_is_kept_where_a_kl_is_asked_for_alone(name, skilled, monkeypatch, tmp_path):
    """And to log it changes no advantage."""
    monkeypatch.chdir(tmp_path)
    small = {"task": "arithmetic", "n": 4, "steps": 3, "prompts_per_step": 4, "eval_n": 2, "eval_problems": 1,
             "levels": (1,), "lr": 1e-2, "kl_coef": 0.0, "N" if name == "bon_rl" else "k": 2}  # fmt: skip
    copies, trained, deepcopy, step = [], {}, copy.deepcopy, common.policy_gradient_step
    policies = (common.Policy, torch.nn.Module)
    monkeypatch.setattr(copy, "deepcopy", lambda x, *_: copies.extend([1] * isinstance(x, policies)) or deepcopy(x, *_))
    for log_kl in (False, True):
        seen = trained[log_kl] = []
        monkeypatch.setattr(common, "policy_gradient_step", lambda *args: seen.append(args[3]) or step(*args))
        args = MODULES[name].Args(**small, model=skilled, device="cpu", run_name=f"{log_kl}", log_kl=log_kl)
        MODULES[name].main(args)
        log = steps_of(Path("runs") / f"{log_kl}")
        assert len(copies) == log_kl and [record.get("kl", 0) > 1e-4 for record in log][-1] == log_kl
        assert any(record["nonzero_advantage"] > 0 for record in log) and ("kl" in log[0]) == log_kl
    assert all(torch.equal(a, b) for a, b in zip(*trained.values(), strict=True))


# --- Logs ---


@pytest.mark.parametrize("N", [1, 2])
def test_tokens_a_second_count_what_was_sampled_alone(N, run, skilled, monkeypatch, tmp_path):
    """SFT reads the experts' tokens, too: they are given, not sampled."""
    sampled, sample = [], common.sample

    def spy(*args, **others):
        rollouts = sample(*args, **others)
        sampled.append(int(rollouts.mask.sum()))
        return rollouts

    monkeypatch.setattr(common, "sample", spy)  # training's; evaluation has its own name for it
    small = " ".join(SMALL).replace("--n 4", "--n 4" if N > 1 else "").split()
    flags = [*small, "--k", str(N), "--eval-N", "2", "--model", skilled, "--run-name", "a"]
    assert run("bon_sft.py", *flags).returncode == 0
    timings = [json.loads(line) for line in (tmp_path / "runs/a/timings.jsonl").read_text().splitlines()]
    assert len(sampled) == (2 if N > 1 else 0) and len(timings) == 2
    for record, tokens in zip(timings, sampled or [0, 0], strict=True):
        assert record["tokens_per_s"] * record["seconds"] == pytest.approx(tokens)


def test_the_verdict_of_an_evaluation_is_in_the_order_of_the_problems(begun, monkeypatch):
    """Rank r of two has the problems r, r + 2, ...; together they are as one process has them."""
    run, whole = begun(), []
    assert [problem.level for problem in run.test] == [1] * 5  # --levels 1 is for the evaluation, too
    run.metrics = lambda verdict: whole.append(verdict.rewards[:, 0].tolist()) or {"pass@1": verdict.rewards.mean(-1)}

    def verify(problems, responses):  # a reward that names its problem
        rows = [[float(run.test.index(problem))] * len(row) for problem, row in zip(problems, responses)]
        return Verdict(torch.tensor(rows), torch.zeros(len(rows), len(rows[0]), dtype=torch.int64))

    run.task.verify = verify
    run.evaluate()
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(harness.run, "shard", lambda problems: problems[rank::2])
        monkeypatch.setattr(harness.run, "world", lambda: (rank, 2))
        monkeypatch.setattr(harness.run, "all_gather", lambda value: value and shares.append(value) or [value])
        with pytest.raises(IndexError):  # half of the problems are not here
            run.evaluate()
    monkeypatch.setattr(harness.run, "all_gather", lambda value: value and shares or [value])  # a failure is no value
    run.evaluate()
    assert whole == [list(range(5)), list(range(5))]


NO_REWARD = "--task arithmetic --levels 1 --n 4 --prompts-per-step 2 --eval-n 4 --eval-problems 1 --eval-every 0"
NO_REWARD = NO_REWARD.split()


@pytest.mark.parametrize("script", ["pass_at_k_pg.py", "majority_pg.py", "bon_rl.py"])
def test_without_a_reward_a_kl_penalty_moves_nothing(script, run, untrained, tmp_path):
    """The policy is its own reference until a reward moves it: ratios, advantages and gradients are exactly 0."""
    flags = [*NO_REWARD, "--k", "2", "--steps", "3", "--kl-coef", "0.3", "--max-new-tokens", "3"]
    ended = run(script, *flags, "--model", untrained, "--run-name", "r")
    assert ended.returncode == 0, ended.stderr
    values = {"kl": 0, "nonzero_advantage": 0, "prompts_without_signal": 1, "grad_norm": 0}
    assert all({name: record[name] for name in values} == values for record in steps_of(tmp_path / "runs/r"))
    before, after = (load_file(Path(x) / "model.safetensors") for x in (untrained, tmp_path / "runs/r/policy"))
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_run_without_a_signal_says_so_after_20_steps_and_at_its_end(run, untrained, skilled):
    """Once each; at its end before the table."""
    warning, last = "none of the first 20 steps had a signal", "no step had a signal, and nothing was learnt: look at"
    flags = [*NO_REWARD, "--k", "2", "--steps", "21", "--max-new-tokens", "2"]
    out = run("pass_at_k_pg.py", *flags, "--model", untrained).stdout
    assert out.count(warning) == out.count(last) == 1 and out.count("--show-samples 5") == 2
    assert out.partition(last)[2].splitlines()[1].startswith("1 held-out problems; ")
    out = run("pass_at_k_pg.py", *flags, "--model", skilled).stdout
    assert warning not in out and last not in out and "held-out" in out


def test_an_evaluation_leaves_a_bounded_sample_of_its_responses(begun):
    """Of 120 problems 50, evenly spaced: 0, 2, 4, 7, 9, 12, ...; of 6 responses to each the first 4."""
    run = begun()
    run.test = [Problem(f"{i}+0=", str(i)) for i in range(120)]
    run.args.eval_n = 6
    rewards, given = torch.arange(720).view(120, 6) / 720, []

    def verify(problems, responses):
        given.extend(responses)
        return Verdict(rewards, torch.zeros(120, 6, dtype=torch.int64))

    run.task.verify = verify
    for step in (0, 3):
        run.progress["step"] = step
        run.evaluate()
    found = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == [0] * 50 + [3] * 50
    assert [record["prompt"] for record in found[50:56]] == ["0+0=", "2+0=", "4+0=", "7+0=", "9+0=", "12+0="]
    assert found[-1]["prompt"] == "117+0=" and found[-1]["responses"] == given[237][:4]
    assert found[53]["rewards"] == pytest.approx([x / 720 for x in (42, 43, 44, 45)])


def test_the_progress_bar_shows_five_figures_in_80_columns(begun, capsys):
    """Step, time left, and three of what the script names, in plain digits."""
    run = begun()
    run.args.steps, run.args.save_every = 12345, 99999
    run.evaluate, run.save = lambda: {}, lambda: None
    steps = run.steps(run.metrics, "variational N=16")
    next(steps)
    record = {"reward": 0.123456, "pass@16": 0.98765, "kl": 12345.6, "nonzero_advantage": 1.0, "skipped": 0}
    rollouts = None
    for shown in (("reward", "pass@16", "kl", "tokens_per_s"), ("reward", "absent", "tokens_per_s")):
        verdict = Verdict(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
        run.log(1, rollouts, verdict, dict(record), shown)
        run.bar.refresh()
        line = capsys.readouterr().err.split("\r")[-1].rstrip()
        expected = "reward=0.123, pass@16=0.988, kl=12346]" if "kl" in shown else "reward=0.123, tokens_per_s=0]"
        assert re.fullmatch(r"variational N=16: 0/12345 \[(\?|[\d:]+) left, " + re.escape(expected), line)
        assert len(line) <= 80
    steps.close()


def test_the_learning_rate_rises_before_it_falls():
    """4 steps of warm-up and 8 behind them, of which the first has the whole rate and the last an eighth."""
    plain = SimpleNamespace(lr=2.0, steps=4, lr_decay=True)
    assert [learning_rate(step, plain) for step in (1, 2, 3, 4)] == [2, 1.5, 1, 0.5]
    both = SimpleNamespace(lr=2.0, steps=12, warm_up_steps=4, lr_decay=True)
    assert [learning_rate(step, both) for step in (1, 2, 4, 5, 6, 12)] == [0.5, 1, 2, 2, 1.75, 0.25]
    constant = SimpleNamespace(lr=2.0, steps=12, warm_up_steps=4, lr_decay=False)
    assert [learning_rate(step, constant) for step in (1, 4, 5, 12)] == [0.5, 2, 2, 2]
    assert bon_rl.PAPER["lr_decay"] is False  # Table 2
