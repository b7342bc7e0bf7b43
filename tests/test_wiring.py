"""One step of each script, by value: what reaches the training step, the KL, the value network and an evaluation.

The verifier is a stub, whose scores contradict its rewards. All runs at temperature .7, on prompts and responses of
unequal length. Expected numbers are worked out in the comments beside them, for n = 4."""

import copy
import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import records, save_untrained
from test_sampler import naive_log_probs, random_policy, rollouts_of
from transformers import AutoModelForCausalLM

import bon_rl
import bon_sft
import common
import harness.parallel
import harness.run
import majority_pg
import pass_at_k_pg
from verifiers import Problem, Task, Verdict, learned

A, B = "3*2=", "47*85="
PROBLEMS = [Problem(A, "6", "6", 1), Problem(B, "3995", "3995", 2)]
EXPERT = {A: (1.0, 0.5), B: (0.0, 0.0)}  # reward and score of its response
GRADED = {A: [1, 0.5, 0, 0.25], B: [0, 1, 1, 0]}  # rewards
SCORES = {A: [0, 2, 3, 1], B: [1, 0, 0, 1]}  # of a learned verifier, which is wrong
ONE_OR_ALL = {A: [1, 0, 0, 0], B: [0, 1, 1, 1]}
VOTES = {A: [0, 1, 1, -1], B: [0, 2, 2, 2]}
BASELINE = {A: 0.2, B: -0.1}  # put in for the values of the value network
RATIOS = {A: [math.log(2), 0, 0, 0], B: [0, math.log(4), 0, 0]}  # log pi - log pi_ref, put in for those of `log_ratios`
KL = ((1 / 2 - 1 + math.log(2)) + (1 / 4 - 1 + math.log(4))) / 8  # e^-x - 1 + x of these, the mean of eight responses
TILT = 2.2886406  # lambda_N of N = 2
T = 0.7  # temperature
ENDS = [1, *range(40, 99, 2)]  # tokens that end a response


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a random policy far from uniform, with many tokens that end a response."""
    folder = save_untrained(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for p in model.parameters():
        p.data.mul_(10 if p.ndim > 1 else 1)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    return folder


def by_prompt(table: dict[str, list], prompts: list[str]) -> torch.Tensor:
    return torch.tensor([table[prompt] for prompt in prompts]).float()


def log_probs(model, rollouts) -> torch.Tensor:
    """(B, n, T) at temperature .7, one unpadded pass a response."""
    return naive_log_probs(SimpleNamespace(model=model), rollouts, T) * rollouts.mask


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def one_step(model, monkeypatch, tmp_path):
    """one_step(script, rewards, **arguments) -> a step of the script's `main`, and what its functions were given."""
    monkeypatch.chdir(tmp_path)

    def row(values: list, prompt: str, size: int, expert: int) -> list[float]:
        experts = [EXPERT[prompt][expert]] * (size == 5)  # bon_sft.py's own comes first
        return (experts + values + values)[:size]

    def run(script, rewards=GRADED, **arguments):
        seen = SimpleNamespace(verified=[], fitted=[], ratios=[], drawn=[], evaluated=[], left=[], copied=[])

        def verify(problems, responses):
            prompts = [problem.prompt for problem in problems]
            seen.verified.append((prompts, list(responses)))
            values = [rewards.get(problem.answer, rewards.get(problem.prompt)) for problem in problems]
            table = [row(x, prompt, len(texts), 0) for x, prompt, texts in zip(values, prompts, responses)]
            votes = torch.tensor([(VOTES[prompt] * 2)[: len(table[0])] for prompt in prompts])
            return Verdict(torch.tensor(table).float(), votes, {"timeouts": 2})

        def score(prompts, responses):
            return torch.tensor([row(SCORES[x], x, len(texts), 1) for x, texts in zip(prompts, responses)]).float()

        def ratios(policy, reference, rollouts):
            seen.ratios.append((policy, reference, rollouts))
            first = by_prompt(RATIOS, seen.prompts_of(rollouts)).unsqueeze(-1)  # (B, n, 1): all of it on one token
            return torch.cat([first, torch.zeros(*rollouts.ids.shape[:2], rollouts.ids.shape[2] - 1)], -1)

        def copied(x, *memo):
            seen.copied.extend([type(x)] * isinstance(x, (common.Policy, torch.nn.Module)))
            return deepcopy(x, *memo)

        def fit(network, optimizer, policy, prompts, target):
            seen.fitted.append(target)
            values, loss = real_fit(network, optimizer, policy, prompts, target)
            assert values.tolist() == [0, 0] and optimizer.param_groups[0]["lr"] == 0.003
            return by_prompt(BASELINE, [policy.tokenizer.decode(prompt) for prompt in prompts]), loss

        def step(*args, **options):
            given = inspect.signature(real_step).bind(*args, **options)
            given.apply_defaults()
            seen.given = SimpleNamespace(**given.arguments)
            seen.prompts = seen.prompts_of(seen.given.rollouts)
            seen.lr = seen.given.optimizer.param_groups[0]["lr"]
            record = real_step(*args, **options)
            seen.left.append(weights(seen.given.policy.model).clone())
            return record

        tokenizer = harness.policy.tiny_tokenizer()
        seen.prompts_of = lambda rollouts: [tokenizer.decode(prompt) for prompt in rollouts.prompts]
        noted = lambda kind, function: lambda *args: kind.append(function(*args)) or kind[-1]  # noqa: E731
        real_step, real_fit, deepcopy = common.policy_gradient_step, bon_rl.ValueNetwork.fit, copy.deepcopy
        task = Task("arithmetic", PROBLEMS, PROBLEMS, verify, max_new_tokens=4)
        with monkeypatch.context() as patch:
            patch.setattr("verifiers.arithmetic.load", lambda *_: task)
            patch.setattr(learned, "load_verifier", lambda *_, **__: SimpleNamespace(score=score))
            patch.setattr(common, "sample", noted(seen.drawn, common.sample))
            patch.setattr(harness.run, "sample", noted(seen.evaluated, harness.run.sample))
            patch.setattr(common, "log_ratios", ratios)
            patch.setattr(copy, "deepcopy", copied)
            patch.setattr(bon_rl.ValueNetwork, "fit", fit)
            patch.setattr(common, "policy_gradient_step", step)
            size = {"N": 2} if script in (bon_rl, bon_sft) else {"k": 2}
            fixed = dict(task="arithmetic", steps=1, n=4, prompts_per_step=2, temperature=T, eval_n=4, device="cpu",
                         sample_rows=3, micro_batch_tokens=20)  # fmt: skip
            script.main(script.Args(**(size | fixed | {"lr": 0.01} | arguments), model=model, run_name="r"))
        seen.log = records(tmp_path / "runs/r")
        seen.timing = json.loads((tmp_path / "runs/r/timings.jsonl").read_text().splitlines()[0])
        seen.before, seen.after = (AutoModelForCausalLM.from_pretrained(x) for x in (model, "runs/r/policy"))
        return seen

    return run


LEARNED = {"verifier": "learned", "verifier_model": "the stub"}
VALUE = {"baseline": "value", "value_lr": 0.003}
# script, rewards, arguments, and the advantages (of bon_sft.py the coefficients, its expert's first). Where A_i is
# (1/6) sum over the 3 others j of [f(i, j) - f(j)], f(i, j) being the value of a pair, its three terms are written out.
STEPS = {
    "pass@2": (pass_at_k_pg, GRADED, {},
               {A: [(.5 + 1 + .75) / 6, (.5 + .25) / 6, 0, .25 / 6], B: [0, 2 / 6, 2 / 6, 0]}),
    "mean": (pass_at_k_pg, GRADED, {"estimator": "mean", "log_kl": True},  # (1/4) (r_i - mean of the others)
             {A: [3 / 16, 1 / 48, -7 / 48, -1 / 16], B: [-1 / 6, 1 / 6, 1 / 6, -1 / 6]}),
    # ties .5; the blank casts no vote
    "maj@2": (majority_pg, ONE_OR_ALL, {"estimator": "unbiased", "kl_coef": 0.0, "max_new_tokens": 3},
              {A: [(.5 + .5 + 1) / 6, -.5 / 6, -.5 / 6, 0], B: [-.5 * 3 / 6, .5 / 6, .5 / 6, .5 / 6]}),
    # the gradient of maj@1: mean reward less the others'
    "maj@2 biased": (majority_pg, ONE_OR_ALL, {"kl_coef": 0.0, "log_kl": True},
                     {A: [1 / 4, 1 / 4 - 1 / 3, 1 / 4 - 1 / 3, 1 / 4 - 1 / 3], B: [-1 / 4, 1 / 12, 1 / 12, 1 / 12]}),
    # A: by its scores the third sample beats all, the second the fourth, the fourth the first. B: 1 and 4 tie.
    "bon@2": (bon_rl, GRADED, LEARNED | {"warm_up_steps": 4},
              {A: [0, (.5 - 1 + .5 - .25) / 6, (-1 - .5 - .25) / 6, (.25 - 1) / 6], B: [-2 / 6, 0, 0, -2 / 6]}),
    "rlb-all": (bon_rl, ONE_OR_ALL, {"estimator": "rlb-all", "log_kl": True},  # N p (r - (1 - p)) / 4, p = 3/4 and 1/4
                {A: [9 / 32, -3 / 32, -3 / 32, -3 / 32], B: [-3 / 32, 1 / 32, 1 / 32, 1 / 32]}),
    # Groups 1 2 | 3 4. A: the winners 2 and 3 are worth .5 and 0, less the baseline .3 and -.2; each group's tilt, by
    # l/4 a sample, goes to those of the other that it beats. B: the winners 1 and 4 are worth 0, less the baseline .1.
    "variational": (bon_rl, GRADED, LEARNED | VALUE | {"estimator": "variational"},
                    {A: [-.2 * TILT / 4, .3 / 2 - .2 * TILT / 4, -.2 / 2, .3 * TILT / 4],
                     B: [.1 / 2 + .1 * TILT / 4, .1 * TILT / 4, .1 * TILT / 4, .1 / 2 + .1 * TILT / 4]}),
    "mean less a value": (bon_rl, GRADED, LEARNED | VALUE | {"estimator": "mean"},  # (r_i - baseline) / 4
                          {A: [.8 / 4, .3 / 4, -.2 / 4, .05 / 4], B: [.1 / 4, 1.1 / 4, 1.1 / 4, .1 / 4]}),
    # 1/4 - P(j wins) + (l/4) (P(two of the others < s_j) - [s* < s_j]); A: s* = 1/2, B: s* = 0
    "SFT": (bon_sft, GRADED, LEARNED,
            {A: [1, 1 / 4, 1 / 4 - 1 / 3 + TILT / 4 * (1 / 3 - 1), 1 / 4 - 1 / 2, 1 / 4 - 1 / 6 - TILT / 4],
             B: [1, 1 / 4 - 5 / 12 + TILT / 4 * (1 / 3 - 1), 1 / 6, 1 / 6, 1 / 4 - 5 / 12 + TILT / 4 * (1 / 3 - 1)]}),
    # ([s_j = 0] - p) / 4 times 1 / (1 - p) - 2 p / (1 - p^2) = 4/7 for the right expert, p = 3/4; 1/p = 4, p = 1/4
    "SFT exact": (bon_sft, ONE_OR_ALL, {"likelihood": "exact"},
                  {A: [1, -3 / 16 * 4 / 7, *[1 / 16 * 4 / 7] * 3], B: [1, 3 / 16 * 4, *[-1 / 16 * 4] * 3]}),
    "plain SFT": (bon_sft, GRADED, {"N": 1}, {A: [1], B: [1]}),
}  # fmt: skip
# What the value network is fitted to: the mean reward, or the reward of the best-scored of two: of A 0 in 3 of 6 pairs,
# .5 in 2, .25 in 1; of B 1 in 1 of 6.
TARGETS = {"variational": {A: 5 / 24, B: 1 / 6}, "mean less a value": {A: 7 / 16, B: 1 / 2}}
# Metrics of A and of B, by scores and by rewards: bon@2 as above; pass@2 of A: 1 in 3 pairs, .5 in 2, .25 in 1; of B: 5
# of 6.
OF_GRADED = {"pass@1": (7 / 16, 1 / 2), "pass@2": (17 / 24, 5 / 6), "pass@4": (1, 1)}
OF_SCORED = OF_GRADED | {"bon@1": (7 / 16, 1 / 2), "bon@2": (5 / 24, 1 / 6), "bon@4": (0, 0)}
EVALUATIONS = {
    "pass@2": OF_GRADED,
    "maj@2": {"pass@2": (1 / 2, 1), "maj@1": (1 / 4, 3 / 4), "maj@2": ((.5 + .5 + 1) / 6, (3 * .5 + 3) / 6),
              "maj@4": (0, 1)},
    "bon@2": OF_SCORED,
    "SFT": OF_SCORED,
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_step_by_value(case, one_step):
    """What is sampled and scored, the advantages, the value network's target, the loss, the weights after one step of
    AdamW, and the evaluations before and after it."""
    script, rewards, arguments, expected = STEPS[case]
    seen = one_step(script, rewards, max_grad_norm=0.5, **arguments)
    given, advantages = seen.given, by_prompt(expected, seen.prompts)
    torch.testing.assert_close(given.advantages.float(), advantages, rtol=1e-5, atol=1e-6)
    assert sorted(seen.prompts) == [A, B] and given.max_grad_norm == 0.5
    assert given.average_gradients is harness.parallel.average_gradients
    rollouts, texts = given.rollouts, common.decode(given.policy, given.rollouts)
    assert (given.policy.sample_rows, given.policy.micro_batch_tokens) == (3, 20)
    assert rollouts.temperature == T and rollouts.mask.sum(-1).unique().numel() > 1
    assert (seen.prompts, [row[: len(own)] for row, own in zip(texts, seen.verified[-2][1])]) == seen.verified[-2]
    if script is bon_sft:
        assert seen.log[1]["expert_reward"] == 0.5
        assert [row[0] for row in texts] == ["6" if prompt == A else "3995" for prompt in seen.prompts]
    for drawn in (*seen.drawn, seen.evaluated[-2]):  # before the step
        torch.testing.assert_close(drawn.log_probs, log_probs(seen.before, drawn), rtol=1e-4, atol=1e-5)
    loss = -(advantages * log_probs(seen.before, rollouts).sum(-1)).sum() / 2
    record = seen.log[1]
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and record["step"] == 1
    assert [line["timeouts"] for line in seen.log] == [2, 2, 2]  # of an evaluation as of a step
    sampled = sum(int(drawn.mask.sum()) for drawn in seen.drawn)  # an expert's tokens are given
    assert seen.timing["tokens_per_s"] * seen.timing["seconds"] == pytest.approx(sampled)
    if target := TARGETS.get(case):
        torch.testing.assert_close(seen.fitted[0].float(), by_prompt(target, seen.prompts))
        assert record["value_loss"] == pytest.approx(sum(value**2 for value in target.values()) / 2)
        assert record["bon@2"] == pytest.approx((5 / 24 + 1 / 6) / 2)
    # a copy of the policy is kept where its KL is logged, which changes no advantage, and one for a value network
    assert len(seen.copied) == ("log_kl" in arguments) + ("baseline" in arguments)
    assert record.get("kl", 0) == pytest.approx(KL * ("log_kl" in arguments))
    if script is not bon_sft:
        tokens, ended = sampled / 8, torch.isin(rollouts.ids, torch.tensor(ENDS)).sum().item()
        logged = {"length": tokens, "entropy": -rollouts.log_probs.sum().item() / 8 / tokens, "skipped": 0}
        logged |= {"truncated": 1 - ended / 8, "no_answer": 1 / 8}
        assert {name: record[name] for name in logged} == pytest.approx(logged) and 0 < ended < 8
    if case == "maj@2":
        assert [drawn.ids.shape[-1] for drawn in (*seen.drawn, *seen.evaluated)] == [3, 3, 3]
        assert record["maj@2"] == pytest.approx((1 / 3 + 3 / 4) / 2)
    if case != "plain SFT":
        assert record["reward"] == pytest.approx(by_prompt(rewards, [A, B]).mean().item())
    assert seen.lr == 0.01 / arguments.get("warm_up_steps", 1)
    optimizer = torch.optim.AdamW(seen.before.parameters(), lr=seen.lr, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(seen.before.parameters(), 0.5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    optimizer.step()
    start = weights(AutoModelForCausalLM.from_pretrained(given.policy.model.name_or_path))
    moved, expected = weights(seen.after) - start, weights(seen.before) - start
    assert (moved - expected).norm() < 1e-3 * expected.norm()  # a gradient near 0 has any sign, and AdamW follows it
    drawn = seen.evaluated[-1]
    torch.testing.assert_close(drawn.log_probs, log_probs(seen.after, drawn), rtol=1e-4, atol=1e-5)
    assert [record["step"] for record in seen.log] == [0, 1, 1]
    for metric, (of_a, of_b) in EVALUATIONS.get(case, {}).items():
        levels = {"1": of_a, "2": of_b, "all": (of_a + of_b) / 2}
        error = 12.706 * abs(of_a - of_b) / 2  # of two values: Student's t times their deviation over the root of 2
        for result in (seen.log[0]["eval"], seen.log[2]["eval"]):
            assert {x: result[x][metric][0] for x in levels} == pytest.approx(levels), metric
            assert result["all"][metric][1] == pytest.approx(error)


@pytest.mark.parametrize("N", [1, 2])
def test_a_step_on_several_experts_of_a_prompt_by_value(N, one_step, tmp_path):
    """A file has two experts of A and one of B. The m experts of a prompt have the weight 1/m each. Its samples are
    drawn once and scored by the answer of each expert; their coefficients are averaged over the experts."""
    rows = [{"problem": x, "response": y, "answer": y} for x, y in ((A, "6"), (A, "7"), (B, "3995"))]
    (tmp_path / "experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = {"6": [1, 0, 0, 0], "7": [0, 1, 1, 0], "3995": [0, 1, 1, 0]}  # by the expert's answer
    seen = one_step(bon_sft, rewards, N=N, experts="experts.jsonl")
    # as the coefficients of "SFT" above; the experts of A have the score 1, the expert of B has 0
    six = [1 / 4 - 1 / 2 + TILT / 4, *[1 / 4 - 1 / 6] * 3]
    seven = [1 / 6, *[1 / 4 - 5 / 12 + TILT / 12] * 2, 1 / 6]
    of_b = [1 / 6, *[1 / 4 - 5 / 12 + TILT / 4 * (1 / 3 - 1)] * 2, 1 / 6]
    expected = {A: [0.5, 0.5, *((x + y) / 2 for x, y in zip(six, seven))], B: [1, 0, *of_b]}
    expected = by_prompt(expected, seen.prompts)[:, : 2 + 4 * (N > 1)]
    torch.testing.assert_close(seen.given.advantages.float(), expected, rtol=1e-5, atol=1e-6)
    texts = dict(zip(seen.prompts, common.decode(seen.given.policy, seen.given.rollouts)))
    assert texts[A][:2] == ["6", "7"] and texts[B][:2] == ["3995", ""]


@pytest.mark.parametrize("script", [pass_at_k_pg, majority_pg, bon_rl])
def test_a_kl_by_value(script, one_step):
    """The KL is to the initial policy, in bon_rl.py to an average that follows the policy. A prompt whose
    rewards are equal has no signal, whatever the KL adds to its advantages."""
    seen = one_step(script, {A: [1, 0, 0, 0], B: [1] * 4}, kl_coef=0.5, estimator="mean", epochs=2, clip=0.3)
    assert (seen.given.epochs, seen.given.clip) == (2, 0.3)
    ((policy, reference, rollouts),) = seen.ratios
    assert policy is seen.given.policy and reference.model is not policy.model and rollouts is seen.given.rollouts
    of_rewards = {A: [1 / 4, *[-1 / 12] * 3], B: [0] * 4}
    of_ratios = {A: [-math.log(2) / 4, *[math.log(2) / 12] * 3]}  # (1/4) (the others' mean minus its own)
    of_ratios[B] = [math.log(4) / 12, -math.log(4) / 4, *[math.log(4) / 12] * 2]
    expected = by_prompt(of_rewards, seen.prompts) + 0.5 * by_prompt(of_ratios, seen.prompts)
    torch.testing.assert_close(seen.given.advantages, expected)
    assert seen.log[1]["kl"] == pytest.approx(KL)
    assert (seen.log[1]["prompts_without_signal"], seen.log[1]["nonzero_advantage"]) == (1 / 2, 1)
    before, after, rate = weights(seen.before), weights(seen.after), getattr(script.Args, "anchor_rate", 0)
    torch.testing.assert_close(weights(reference.model), before + rate * (after - before))
    assert (after - before).abs().max() > 1e-3


def test_the_anchor_is_an_average_of_what_each_step_left(one_step):
    """It moves by a tenth to the policy after the first step, then after the second, and at no other time."""
    seen = one_step(bon_rl, ONE_OR_ALL, kl_coef=0.5, estimator="mean", steps=2, eval_every=0, anchor_rate=0.1)
    first, second = seen.left
    expected = 0.9 * (0.9 * weights(seen.before) + 0.1 * first) + 0.1 * second
    torch.testing.assert_close(weights(seen.ratios[-1][1].model), expected, rtol=1e-5, atol=1e-6)
    assert (first - weights(seen.before)).abs().max() > 5e-3 and (second - first).abs().max() > 2e-3


@pytest.mark.parametrize("max_grad_norm, rate", [(1e9, 1e-3), (0.05, 0.3)])
def test_two_epochs_are_clipped_by_value(max_grad_norm, rate):
    """Two steps of SGD on the same rollouts, the second where some ratios are beyond 1 ± .02, written out."""
    policy, plain = random_policy("llama"), random_policy("llama").model
    rollouts = rollouts_of(policy, temperature=T)
    advantages = torch.randn(rollouts.ids.shape[:2], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=rate)

    def average(parameters):  # with another process, which has gradients of 0
        for p in parameters:
            p.grad /= 2

    record = common.policy_gradient_step(policy, optimizer, rollouts, advantages, max_grad_norm, 2, 0.02, average)
    for _ in range(2):
        ratio = (log_probs(plain, rollouts) - rollouts.log_probs).exp()  # (B, n, T), 1 at filler
        best = (ratio * advantages.unsqueeze(-1), ratio.clamp(0.98, 1.02) * advantages.unsqueeze(-1))
        loss = -(torch.minimum(*best) * rollouts.mask).sum() / len(rollouts.prompts)
        gradients = torch.autograd.grad(loss / 2, list(plain.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p, g in zip(plain.parameters(), gradients):
            p.data -= rate * g * min(1, max_grad_norm / norm)
    beyond = ((ratio - 1).abs() > 0.02) & rollouts.mask
    assert 0.1 < beyond.sum() / rollouts.mask.sum() < 0.95
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    torch.testing.assert_close(weights(policy.model), weights(plain), rtol=1e-4, atol=1e-5)
