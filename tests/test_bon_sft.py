"""The coefficients of bon_sft.py against the exact gradient of log pi_bon(y*), and N = 1 against plain SFT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enumeration import BINARY, PROMPTS, THETA, expected_gradient, log_policy
from runs import SMALL
from test_best_of_n import EXACT, best_of_n_policy, failure_rates, tilted
from test_estimators import SCORES

import bon_sft
import common
import harness.policy
import harness.run
from bon_sft import Args, coefficients, experts_of
from harness.problems import training_batch
from verifiers import BadInput, Problem, arithmetic, load_task

EXPERTS = [2, 1]  # the expert's action at each prompt


def of_experts(values, experts=EXPERTS):
    """Mean over prompts of the experts' values, (PROMPTS, K) -> a scalar."""
    return values[torch.arange(PROMPTS), experts].mean()


def estimated(N, n, scores, likelihood, experts, p_fail=None):
    """The expected gradient: the expert's term, and the samples' terms over all tuples of n samples."""

    def of_samples(b, y):
        p = None if p_fail is None else p_fail[b].expand(len(y))
        A = coefficients(scores[b, experts[b]].expand(len(y)), scores[b][y], N, likelihood, p)  # (R, 1 + n)
        assert (A[:, 0] == 1).all()
        return A[:, 1:]

    return torch.autograd.grad(of_experts(log_policy(), experts), THETA)[0] + expected_gradient(of_samples, n)


@pytest.mark.parametrize("N, n", [(2, 3), (2, 5), (3, 4), (4, 5)])
def test_variational_is_the_papers_formula(N, n):
    """E_D[h(y*)] - E_{y ~ pi_bon}[h(y)], all its expectations exact, under a verifier with ties."""
    h = tilted(N)
    total = of_experts(h) - (best_of_n_policy(N).detach() * h).sum(-1).mean()
    exact = torch.autograd.grad(total, THETA)[0]
    torch.testing.assert_close(estimated(N, n, SCORES, "variational", EXPERTS), exact, **EXACT)


@pytest.mark.parametrize("experts", [[1, 2], [0, 2], [2, 3]], ids=["right", "one wrong", "wrong"])
@pytest.mark.parametrize("N, n", [(2, 3), (3, 4), (3, 5)])
def test_exact_is_the_gradient_of_the_log_likelihood_of_best_of_n(N, n, experts):
    """pi_bon(y*) by enumeration of all N-tuples, its logarithm by autograd; 0/1 verifier, P_fail known."""
    exact = torch.autograd.grad(of_experts(best_of_n_policy(N, BINARY).log(), experts), THETA)[0]
    torch.testing.assert_close(estimated(N, n, BINARY, "exact", experts, failure_rates()), exact, **EXACT)


def test_bad_input_is_refused():
    one = torch.ones(1)
    refused = {f"not N={N} with n=3": (one, N) for N in (0, 3, 4)}
    refused |= {"unknown likelihood": (one, 2, "map"), "scores that are 0 or 1": (one, 2, "exact")}
    refused |= {r"finite.*\[0, 0\]": (one * torch.nan, 2)}
    for complaint, (expert, *options) in refused.items():
        with pytest.raises(ValueError, match=complaint):
            coefficients(expert, torch.tensor([[0.0, 1.0, 0.5]]), *options)


def test_n_1_is_plain_sft_to_the_bit(untrained, tmp_path, monkeypatch):
    """Three steps of the script against three written out: the weights are equal, not close."""
    monkeypatch.chdir(tmp_path)
    small = {"task": "arithmetic", "levels": (1,), "eval_n": 2, "eval_problems": 1, "steps": 3, "prompts_per_step": 4}
    bon_sft.main(Args(N=1, eval_N=2, model=untrained, run_name="r", lr_decay=False, **small))
    task = load_task("arithmetic")
    train = [problem for problem in task.train if problem.level == 1]
    policy = harness.policy.load_policy(untrained, task)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=Args.lr, weight_decay=0.0, fused=True)
    for step in range(3):
        problems = training_batch(train, step, 4, seed=0)
        prompts = policy.tokenizer([problem.prompt for problem in problems]).input_ids
        rows = [policy.tokenizer(p.solution).input_ids + [policy.tokenizer.eos_token_id] for p in problems]
        order = sorted(range(4), key=lambda i: -len(prompts[i]) - len(rows[i]))  # which decides a sum's last bit
        ids, mask = common.padded([rows[i] for i in order])
        loss = -common.response_log_probs(policy, [prompts[i] for i in order], ids, mask).sum() / 4
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), Args.max_grad_norm)
        optimizer.step()
    trained = harness.policy.load_policy("runs/r/policy", task).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in policy.model.state_dict().items())


def test_experts_from_a_file(tmp_path):
    """Rows of one prompt are one group. The answer is the row's own, or the one for which the response is right."""
    task = load_task("arithmetic")
    problems = [Problem("1+1=", "2", "2"), Problem("1+2=", "3", "3"), Problem("1+2=", "4", "4")]
    path = tmp_path / "experts.jsonl"
    rows = [{"response": "4"}, {"response": "3"}, {"response": "9"}, {"response": "3", "answer": "7"}]
    path.write_text("".join(json.dumps({"problem": "1+2=", **row}) + "\n" for row in rows))
    experts = experts_of(str(path), task, problems)
    assert list(experts) == ["1+2="]
    assert [(p.solution, p.answer) for p in experts["1+2="]] == [("4", "4"), ("3", "3"), ("9", "3"), ("3", "7")]
    for row, complaint in (('{"problem": "2+2=", "response": "4"}', "row 1: '2\\+2=' is no training problem"),
                           ('{"problem": "1+2=", "response": null}', "row 1: the response must be a text"),
                           ('{"problem": "1+2=", "response": "3", "answer": 3}', "row 1: the answer must be a text"),
                           ('{"problem": "1+2="}', "row 1: no column response")):  # fmt: skip
        path.write_text(row + "\n")
        with pytest.raises(BadInput, match=complaint):
            experts_of(str(path), task, problems)


@pytest.mark.parametrize("made", [list, tuple], ids=["in a list", "made on demand"])
def test_problems_without_a_solution_are_told_before_the_model_is_loaded(made, refused, monkeypatch):
    """Else the policy would learn to say nothing."""
    task = replace(load_task("arithmetic"), train=made([Problem("1+1=", "2")]))
    flags = [flag for flag in SMALL if flag not in ("--levels", "1")]
    monkeypatch.setattr(harness.run, "load_task", lambda *_: task)
    monkeypatch.setattr(harness.run, "load_policy", lambda *_: pytest.fail("told after the model is loaded"))
    line = refused("bon_sft.py", *flags)
    assert line == "error: task 'arithmetic' has problems without a solution: give responses by --experts"


def test_experts_are_not_all_padded_at_once(run, untrained, noted):
    """One problem with many experts, or a long one, sets the size of all that are padded with it."""
    sizes = noted(harness.policy, "expert_rollouts", lambda policy, task, prompts, groups, *_: len(groups))
    out = run("bon_sft.py", *SMALL, "--max-new-tokens", "1", "--steps", "1", "--model", untrained, code=0).stdout
    assert sizes == [256, arithmetic.TRAIN_PER_LEVEL - 256, 4]  # then a step's
    assert f"{arithmetic.TRAIN_PER_LEVEL} expert responses are longer than --max-new-tokens 1" in out


def test_experts_that_have_changed_are_not_resumed(run, refused, untrained):
    prompt = next(problem.prompt for problem in load_task("arithmetic").train if problem.level == 1)
    for response in ("1", "2"):
        Path("experts.jsonl").write_text(json.dumps({"problem": prompt, "response": response}))
        if response == "1":
            flags = ["--experts", "experts.jsonl", "--model", untrained, "--run-name", "a"]
            run("bon_sft.py", *SMALL, *flags, code=0)
            run("bon_sft.py", "--resume", "runs/a", code=0)
    assert "--experts experts.jsonl has changed since runs/a began" in refused("bon_sft.py", "--resume", "runs/a")
