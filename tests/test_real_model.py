"""benchmarks/real_model.py: its commands, which runs are done, its tables; slow: its two models and their training."""

import json
import re

import numpy as np
import pytest
import real_model
import torch
from runs import parsed, steps_of
from test_reproduce import rows_of

import harness.policy
from verifiers import BadInput, Problem, load_task
from verifiers.suspects import listed


@pytest.fixture
def args(tmp_path):
    return real_model.Args(out=tmp_path / "out", records=tmp_path / "records.json")


def test_every_run_is_a_command_that_its_script_takes_and_rl_starts_from_the_sft_of_its_seed(args):
    runs = real_model.Runs(args)
    stages = runs.stages()
    assert stages[0] == [("smollm2 sft", 0)] and stages[2] == [("gemma3 sft", 0)] and stages[-2] == [("smollm2 sft", 4)]
    assert stages[1] == [(f"smollm2 {name}", 0) for name in real_model.RUNS if name != "sft"]
    assert stages[3] == [("gemma3 mean", 0), ("gemma3 k8", 0)] and sum(map(len, stages)) == 5 * 7 + 3 * 3
    assert real_model.Runs(real_model.Args("gemma3", seeds=1)).stages() == [[("gemma3 sft", 0)], stages[3]]
    for model, (names, lr, _, _) in real_model.MODELS.items():
        for name in names:
            settings = parsed(runs.command(f"{model} {name}", 2))
            assert (settings.seed, settings.task, settings.steps) == (2, "suspects", 60) and settings.lr_decay
            assert re.fullmatch(r"[\w.-]+", runs.folder(f"{model} {name}", 2).name)  # --run-name takes it
            sft = f"runs/{runs.folder(f'{model} sft', 2).name}/policy"
            assert settings.model == (f"models/{model}" if name == "sft" else sft)
            # Runs that are compared see as many prompts and samples.
            size = settings.lr, settings.prompts_per_step
            assert size == ((5e-5, 16) if name == "sft" else (lr, 32)) and (name == "sft" or settings.n == 16)
    assert parsed(real_model.Runs(real_model.Args(flags="--steps 2")).command("gemma3 k8", 0)).steps == 2


def record(runs, name: str, seed: int, **metrics) -> dict:
    model, _, run = name.partition(" ")
    zeros = dict.fromkeys([*real_model.PASS, "maj@8", "elsewhere", "kl"], 0.0)
    return {"model": model, "run": run, "seed": seed, **zeros, **metrics, "command": runs.command(name, seed)}


def test_a_run_is_done_when_it_has_its_line_and_an_sft_while_rl_needs_its_policy(args):
    runs = real_model.Runs(args)
    names = [f"gemma3 {name}" for name in ("sft", "mean", "k8")]

    def write(*some: str) -> None:
        rows = [record(runs, name, 0) for name in some]
        args.records.write_text(real_model.measure.records_json({"machine": {}, "runs": rows}))

    assert not any(runs.done(name, 0) for name in names)
    write(*names[:2])
    assert [runs.done(name, 0) for name in names] == [False, True, False]  # its policy is not there, and k8 is left
    (runs.folder(names[0], 0) / "policy").mkdir(parents=True)
    assert [runs.done(name, 0) for name in names] == [True, True, False] and not runs.done(names[1], 1)
    (runs.folder(names[0], 0) / "policy").rmdir()
    write(*names)
    assert all(runs.done(name, 0) for name in names)
    other = real_model.Runs(real_model.Args(out=args.out, records=args.records, flags="--steps 2"))
    assert not any(other.done(name, 0) for name in names)  # another command is another run


def test_tables_by_hand(args, monkeypatch):
    monkeypatch.setattr(real_model.frontier, "curve", lambda k: np.array([[0.2, 0.9], [0.6, 0.7]]))
    runs = real_model.Runs(args)
    rows = [record(runs, "smollm2 mean", s, **{"pass@1": 0.6, "pass@8": 0.7, "kl": 0.5}) for s in range(3)]
    rows += [record(runs, "smollm2 k8", s, **{"pass@1": 0.4, "pass@8": 0.75 + s / 100}) for s in range(3)]
    rows += [record(runs, "gemma3 k8", s, **{"pass@1": 0.4, "pass@8": 0.9}) for s in range(2)]
    policies, compared = map(rows_of, real_model.tables(rows).values())
    k8 = "unbiased, k = 8"
    expected = [["SmolLM2-135M", "mean", "3"], ["SmolLM2-135M", k8, "3"], ["Gemma 3 270M", k8, "2"]]
    assert [row[:3] for row in policies] == expected
    # .76 ± 4.303 x .01 / sqrt(3) = .025; at pass@1 .4 the frontier has .8
    assert [policies[1][6], policies[1][9], policies[0][11]] == ["0.760 ± 0.025", "0.040 ± 0.025", "0.500 ± 0.000"]
    (row,) = (row for row in compared if f"pass@8, {k8} minus mean" in row[1])
    known = json.loads(real_model.optima.PREDICTIONS.read_text())["policies"]
    limit = known["k8"]["pass@8"] - known["k1"]["pass@8"]
    assert row[2:] == [f"{limit:+.3f}", "+0.060 ± 0.025", f"{0.06 / limit:.0%}", "holds"]
    panels = real_model.panels(rows)
    assert [title for title, _, _ in panels] == [real_model.TITLES[x] for x in ("tiny", "smollm2", "gemma3")]
    assert panels[1][2][k8].tolist() == [[0.4, 0.75, 0], [0.4, 0.76, 0], [0.4, 0.77, 0]]


def test_what_cannot_be_reported_is_refused(args):
    args.report = True
    with pytest.raises(BadInput, match="no run is in .* yet"):
        real_model.main(args)
    with pytest.raises(BadInput, match="give it --records of its own"):
        real_model.main(real_model.Args(report=True, flags="--steps 2"))


def made(name, folder, plain=False):
    """The folder with this pretrained model. The test is skipped where its package is not installed."""
    try:
        real_model.pretrained.main(real_model.pretrained.Args(name, folder, plain))
    except BadInput as missing:
        pytest.skip(str(missing))
    return str(folder)


@pytest.mark.slow
def test_a_name_has_the_probability_that_the_chat_template_gives_it(tmp_path):
    """The whole chat, with the name as the assistant's turn, in one plain pass of the model."""
    task = load_task("suspects")
    policy = harness.policy.load_policy(made("smollm2", tmp_path), task, "cpu")
    problems = real_model.optima.problems_of()[::120]
    with torch.no_grad():
        found = real_model.exact.candidate_log_probs(policy, task, problems, prompts=2)
        for problem, row in zip(problems, found):
            names = listed(problem.prompt)
            assert len(names) == problem.level and (row[len(names) :] == -torch.inf).all()
            for name, log_pi in zip(names, row):
                user = {"role": "user", "content": f"{problem.prompt}\n\n{task.instruction}"}
                chats = [user], [user, {"role": "assistant", "content": name}]
                texts = (policy.tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats)
                before, whole = (policy.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
                start = len(before) + len(policy.tokenizer("<|im_start|>assistant\n").input_ids)
                end = len(whole) - 1  # of what the template writes, the newline behind the end token is left out
                assert policy.tokenizer.decode(whole[start:end]) == f"{name}<|im_end|>"
                log_p = policy.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
                expected = sum(log_p[i - 1, whole[i]].item() for i in range(start, end))
                assert log_pi.item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_gemma_reads_words_as_its_own_tokenizer_does_and_goes_on_in_english(tmp_path):
    task, problem = load_task("suspects"), Problem("Eve Tom:", "Tom", "Tom", 2)
    policy = harness.policy.load_policy(made("gemma3", tmp_path), task, "cpu")
    (prompt,) = harness.policy.encode_prompts(policy, task, [problem], 4)
    words = "<bos> Choose ▁one ▁of ▁Eve , ▁Tom : ▁I ▁choose".split()
    assert policy.tokenizer.convert_ids_to_tokens(prompt) == words
    experts = harness.policy.expert_rollouts(policy, task, [prompt], [[problem]])
    assert policy.tokenizer.convert_ids_to_tokens(experts.ids[0, 0].tolist()) == ["▁Tom", "<eos>"]
    text = policy.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        said = policy.tokenizer.decode(policy.model(text).logits[0, -1].topk(5).indices)
    assert "Paris" in said or " the" in said or " a" in said


@pytest.mark.slow
def test_a_pretrained_model_is_trained_in_every_way_recorded_and_reported(tmp_path, monkeypatch, capsys):
    """Two steps of each run of real_model.py; its exact values are right for the policies that it left; a run that has
    its line is not made again, though its policy is gone."""
    some = real_model.optima.problems_of()[::40]
    real_model.frontier.curve(8)  # the frontier of all prompts
    weights = real_model.optima.level_weights(some)
    monkeypatch.setattr(real_model.optima, "problems_of", lambda *_: some)
    monkeypatch.setattr(real_model.optima, "held_out", lambda: (None, weights, None))
    monkeypatch.setattr(real_model.frontier, "save_figure", lambda path, panels: None)
    monkeypatch.setattr(real_model, "MODELS", {"smollm2": real_model.MODELS["smollm2"]})
    out, records = tmp_path / "out", tmp_path / "records.json"
    (out / "models").mkdir(parents=True)
    made("smollm2", out / "models" / "smollm2", plain=True)
    args = real_model.Args("smollm2", 1, 2, "--steps 2 --prompts-per-step 2 --eval-n 8", out, records)
    real_model.main(args)
    assert "7 runs to make" in (printed := capsys.readouterr().out)
    rows, runs = real_model.records_in(records), real_model.Runs(args)
    assert [row["run"] for row in rows][0] == "sft" and {row["run"] for row in rows} == set(real_model.RUNS)
    for row in rows:
        assert 0 < row["pass@1"] < row["pass@8"] < 1 and row["kl"] >= -1e-6
        assert len(steps_of(runs.folder(f"smollm2 {row['run']}", 0))) == 2 and f"{row['pass@8']:.3f}" in printed
    task, folder = load_task("suspects"), runs.folder("smollm2 sft", 0)
    policy = harness.policy.load_policy(str(folder / "policy"), task, "cpu")
    (prompt,) = harness.policy.encode_prompts(policy, task, some[:1], 4)
    assert policy.tokenizer.decode(prompt).startswith("Choose one of ")  # without a chat around it
    with torch.no_grad():
        metrics = real_model.exact.exact_metrics(real_model.exact.candidate_log_probs(policy, task, some), some)
    for metric in ("pass@1", "elsewhere"):
        assert rows[0][metric] == pytest.approx((weights @ metrics[metric]).item(), rel=1e-3)
    assert not (runs.folder("smollm2 mean", 0) / "policy").exists()
    text = records.read_text()
    real_model.main(args)
    assert "0 runs to make" in capsys.readouterr().out and records.read_text() == text
