"""harness/run.py: random numbers, which are functions of the arguments alone, what is kept in memory, and the logs."""

import copy
import json
import re
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
from harness.run import learning_rate
from verifiers import Problem, Task, Verdict, arithmetic, load_task

MODULES = {"pass_at_k_pg": pass_at_k_pg, "majority_pg": majority_pg, "bon_rl": bon_rl}


class Lazy:
    """A sequence of problems made on demand, which counts how many were asked for."""

    def __init__(self, problems):
        self.problems, self.asked = problems, 0

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, i):
        self.asked += 1
        return self.problems[i]


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


def sampled(run, step) -> list[list[int]]:
    """The tokens of a step's share of the samples, to the same prompts whatever the run and step."""
    generator = run.batch(step)[2]
    prompts = run.encoded(run.test)
    return common.sample(run.policy, prompts, 4, 8, generator=generator).ids.flatten(0, 1).tolist()


def test_samples_are_a_function_of_seed_step_and_rank(begun, monkeypatch):
    """Seeds 0 and 4 have the same low bits at some places of a word, of which torch reads 32 on the CPU."""
    run = begun(0)
    first = sampled(run, 7)
    assert first == sampled(begun(0), 7)
    others = [sampled(run, 8), *(sampled(begun(seed), 7) for seed in (1, 4, 2**32))]
    for rank in (1, 2):
        monkeypatch.setattr(harness.run, "world", lambda: (rank, 4))
        others.append(sampled(run, 7))
        assert others[-1] == sampled(begun(0), 7)
    every = [first, *others]
    assert all(a != b for i, a in enumerate(every) for b in every[:i])


def test_problems_are_a_function_of_seed_and_step(begun):
    """Four a step of the training problems of level 1; in a pass over them none comes twice."""
    run, other = begun(0), begun(1)
    batches = [each.batch(step)[0] for each in (run, begun(0), other) for step in (1, 2)]
    prompts = [[problem.prompt for problem in problems] for problems in batches]
    assert prompts[:2] == prompts[2:4] and len({tuple(four) for four in prompts}) == 4
    assert {problem.level for each in (run, other) for problem in each.train} == {1}
    whole = [problem for step in range(1, len(run.train) // 4 + 1) for problem in run.batch(step)[0]]
    assert sorted(map(id, whole)) == sorted(map(id, run.train))


def test_an_evaluation_has_other_random_numbers_than_any_step_and_the_same_every_time(begun, monkeypatch):
    drawn, sample = [], common.sample

    def spy(*args):
        drawn.append(torch.rand(8, generator=args[-1].clone_state()).tolist())
        return sample(*args)

    monkeypatch.setattr(harness.run, "sample", spy)
    for seed in (0, 0, 4):
        begun(seed).evaluate()
    run = begun(0)
    run.progress["step"] = 2
    run.evaluate()
    monkeypatch.setattr(harness.run, "world", lambda: (1, 2))
    monkeypatch.setattr(harness.run, "all_gather", lambda value: [value, value])
    run.evaluate()
    same, again, other_seed, later, rank_1 = drawn
    assert same == again == later and other_seed != same and rank_1 not in (same, other_seed)
    for seed in (0, 4):
        for rank in (0, 1):
            monkeypatch.setattr(harness.run, "world", lambda: (rank, 2))
            run = begun(seed)
            for step in range(50):
                numbers = torch.rand(8, generator=run.batch(step)[2]).tolist()
                assert numbers not in drawn


# --- The KL and its copy of the policy ---


class Spies:
    """What a run copies, and the advantages that it trains on, with those of the KL in them."""

    def __init__(self, patch):
        self.copies, self.trained, self.kl = 0, [], []
        deepcopy, step, kl_advantages = copy.deepcopy, common.policy_gradient_step, common.kl_advantages

        def counted(x, *args):
            self.copies += isinstance(x, (common.Policy, torch.nn.Module))
            return deepcopy(x, *args)

        def recorded(policy, optimizer, rollouts, A, *args, **others):
            self.trained.append(A)
            return step(policy, optimizer, rollouts, A, *args, **others)

        def kl(ratios):
            self.kl.append(kl_advantages(ratios))
            return self.kl[-1]

        patch.setattr(copy, "deepcopy", counted)
        patch.setattr(common, "policy_gradient_step", recorded)
        patch.setattr(common, "kl_advantages", kl)


@pytest.fixture
def spied(skilled, monkeypatch, tmp_path):
    """spied(module, **arguments) -> spies on a run of 3 steps, and its log."""
    monkeypatch.chdir(tmp_path)

    def result(name, **others):
        of_k = {"N": 2} if name == "bon_rl" else {"k": 2}
        small = {"task": "arithmetic", "n": 4, "steps": 3, "prompts_per_step": 4, "eval_n": 2, "eval_problems": 1,
                 "levels": (1,), "lr": 1e-2, "kl_coef": 0.0} | others  # fmt: skip
        module, folder = MODULES[name], f"run{len(list(Path('runs').glob('*')))}"
        with pytest.MonkeyPatch.context() as patch:
            spies = Spies(patch)
            module.main(module.Args(**of_k, **small, model=skilled, device="cpu", run_name=folder))
        return spies, steps_of(Path("runs") / folder)

    return result


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_the_policy_is_kept_where_a_kl_is_asked_for_alone(name, spied):
    spies, log = spied(name)
    assert spies.copies == 0 and not any("kl" in record for record in log)
    assert any(record["nonzero_advantage"] > 0 for record in log)
    rewards_alone = spies.trained
    spies, log = spied(name, log_kl=True)
    assert spies.copies == 1 and log[-1]["kl"] > 1e-4 and spies.kl == []
    assert all(torch.equal(a, b) for a, b in zip(spies.trained, rewards_alone, strict=True))
    spies, log = spied(name, kl_coef=0.1)
    assert spies.copies == 1 and log[-1]["kl"] > 1e-4 and len(spies.kl) == 3


@pytest.mark.parametrize("name", MODULES)
def test_beta_is_constant_unless_an_end_is_given(name, spied):
    """What a step trains on is the rewards' advantages and beta times the KL's: beta is read off the difference."""
    ends = [({"kl_coef": 0.25}, [0.25, 0.25, 0.25])]
    if name == "bon_rl":
        moves = {"kl_delay": 0, "kl_anneal_steps": 4}
        ends = [({"kl_coef": 0.25, **moves}, [0.25, 0.25, 0.25]),
                ({"kl_coef": 0.5, "kl_coef_end": 0.1, **moves}, [0.4, 0.3, 0.2]),
                ({"kl_coef": 0.0, "kl_coef_end": 0.1, **moves}, [0.025, 0.05, 0.075]),
                ({"kl_coef": 0.5, "kl_coef_end": 0.2, "kl_delay": 0}, [0.4, 0.3, 0.2])]  # fmt: skip
    for flags, betas in ends:
        with pytest.MonkeyPatch.context() as patch:
            plain, advantages = [], MODULES[name].advantages
            kept = lambda *args, **named: plain.append(advantages(*args, **named)) or plain[-1]  # noqa: E731
            patch.setattr(MODULES[name], "advantages", kept)
            spies, log = spied(name, **flags)
        plain = plain[-3:]  # before the first step an estimator is tried once
        assert len(spies.kl) == 3 and any(A.abs().sum() > 0 for A in plain)
        for step, beta in enumerate(betas):
            torch.testing.assert_close(spies.trained[step] - plain[step], beta * spies.kl[step], rtol=1e-4, atol=1e-6)
        assert spies.kl[2].abs().max() > 1e-3  # from the second step on there is a KL


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


def test_a_run_without_a_signal_says_so_once(run, untrained, skilled):
    warning = "none of the first 20 steps had a signal"
    flags = [*NO_REWARD, "--k", "2", "--steps", "22", "--max-new-tokens", "2"]
    ended = run("pass_at_k_pg.py", *flags, "--model", untrained)
    assert (ended.stdout + ended.stderr).count(warning) == 1 and "--show-samples" in ended.stdout + ended.stderr
    ended = run("pass_at_k_pg.py", *flags, "--model", skilled)
    assert warning not in ended.stdout + ended.stderr


def test_a_run_in_which_no_step_had_a_signal_ends_with_that(run, untrained, skilled):
    """As its first line, before the table, also of few steps; not an evaluation, in which there are none."""
    said = "no step had a signal, and nothing was learnt: look at the responses by --show-samples 5"
    flags = [*NO_REWARD, "--k", "2", "--max-new-tokens", "2", "--steps"]
    lines = run("pass_at_k_pg.py", *flags, "2", "--model", untrained).stdout.splitlines()
    assert lines[2].startswith(said) and lines[3].startswith("1 held-out problems; ")
    for steps, model in (("0", untrained), ("2", skilled)):
        ended = run("pass_at_k_pg.py", *NO_REWARD[:-4], "--eval-n", "4", "--k", "2", "--steps", steps, "--model", model)
        assert ended.returncode == 0 and said not in ended.stdout


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
