"""harness/policy.py beyond the embedded policy: how prompts and responses become tokens, by whose template.

The templates are written here, in the styles of well-known models: what their turns begin and end with."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL, save_untrained
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import common
import harness.policy
from harness.policy import encode_prompts, ends_of_response, expert_rollouts, texts_read
from verifiers import BadInput, Problem, Task
from verifiers.learned import LearnedVerifier

TASK = Task("toy", [], [], None, template="Question: {prompt}\nAnswer:", instruction="Be brief.")
PROBLEMS = [Problem("1+1?", "2", "2"), Problem(" 6+6?\n", "12", "12")]
WORDS = ["1+1?\n\nBe brief.", "6+6?\n\n\nBe brief."]  # what a user says of them

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")  # fmt: skip
GEMMA = ("{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Roles must alternate') }}{% endif %}<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")  # fmt: skip
NOTHING = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
           "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip


def tokenizer_of(template: str | None, specials: str = "<s> </s>", front: bool = True, behind: bool = False):
    """A tokenizer of characters and of the word "answer", with special tokens of which the second ends a sequence. It
    puts the first in `front` of a text and the second `behind` it, as it is asked to."""
    tokenizer, (bos, eos, *others) = harness.policy.tiny_tokenizer(), specials.split()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"answer|[\s\S]"), "isolated")
    vocabulary = tokenizer.get_vocab() | {"answer": len(tokenizer)}
    backend.model = type(backend.model)(vocabulary, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>",
                                        pad_token="<pad>", additional_special_tokens=others,
                                        chat_template=template)  # fmt: skip
    single = " ".join([bos] * front + ["$A"] + [eos] * behind)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def policy_of(tokenizer, eos: str | None = None) -> common.Policy:
    """A policy with a stub for a model. eos: the end tokens of a generation_config.json."""
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=200), device="cpu")
    config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(eos.split()) if eos else None)
    return common.Policy(model, tokenizer, ends_of_response(tokenizer, config))


QWEN, PHIS = "<s> <|endoftext|> <|im_start|> <|im_end|>", "<s> <|endoftext|> <|user|> <|assistant|> <|end|>"
# template, special tokens, generation config's ends; what is read before and behind the user's words; how an expert's
# response "2" is written, and all tokens that end a response
STYLES = {
    "Qwen, base": (CHATML, QWEN, "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
                   "2<|im_end|>", "<|im_end|> <|endoftext|>"),
    "thinking, by default": (  # the model reads the beginning of a thought, which a finished turn leaves out
        CHATML.replace("assistant\n", "assistant\n<think>\n"), QWEN + " <think> </think>", None, "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n", "2<|im_end|>", "<|im_end|> <|endoftext|>"),
    "Phi": (PHI, PHIS, None,  # only the tokenizer knows an end
            "<|user|>\n", "<|end|>\n<|assistant|>\n", "2<|end|>", "<|end|> <|endoftext|>"),
    "Gemma": (GEMMA, "<bos> <eos> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>", "<bos><start_of_turn>user\n",
              "<end_of_turn>\n<start_of_turn>model\n", "2<end_of_turn>", "<end_of_turn> <eos>"),
    "nothing behind a turn": (NOTHING, "<s> </s>", "</s>", "user: ", "\nassistant:", " 2</s>", "</s>"),
}  # fmt: skip


@pytest.mark.parametrize("behind", [False, True], ids=["", "a tokenizer that adds an end token"])
@pytest.mark.parametrize("template, specials, eos, before, between, expert, stops", STYLES.values(), ids=STYLES)
def test_a_chats_turns_are_those_of_its_template(template, specials, eos, before, between, expert, stops, behind):
    policy = policy_of(tokenizer_of(template, specials, behind=behind), eos)
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == stops.split()
    prompts = encode_prompts(policy, TASK, PROBLEMS, 8)
    assert [policy.tokenizer.decode(ids) for ids in prompts] == [before + words + between for words in WORDS]
    chats = [[{"role": "user", "content": words}] for words in WORDS]
    assert prompts == policy.tokenizer.apply_chat_template(chats, add_generation_prompt=True).input_ids
    assert texts_read(policy.tokenizer, TASK, PROBLEMS)[1] == [expert[: expert.index("2")]] * 2
    experts = expert_rollouts(policy, TASK, prompts, [[replace(problem, solution="2")] for problem in PROBLEMS])
    assert [policy.tokenizer.decode(ids) for ids in experts.ids[:, 0]] == [expert] * 2


def test_a_template_that_prints_the_date_prints_the_same_on_every_day():
    """As Llama 3's does, for a policy and for a reward model: a run may be resumed on another day."""
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    policy = policy_of(tokenizer_of(today + "{{ date_string }}\n" + PHI, PHIS))
    assert texts_read(policy.tokenizer, TASK, PROBLEMS)[0][0].startswith("26 Jul 2024\n<|user|>\n1+1?")
    verifier = LearnedVerifier(policy.model, policy.tokenizer, TASK)
    read = policy.tokenizer.decode(verifier.tokens(["1+1?"], ["2"]).input_ids[0])
    assert read.startswith("26 Jul 2024\n<|user|>\n1+1?")


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_without_a_chat_template_the_tasks_words_are_read(front, behind):
    """A tokenizer's beginning token stands in front once; its end token would end the prompt."""
    policy = policy_of(tokenizer_of(None, front=front, behind=behind))
    prompts = encode_prompts(policy, TASK, PROBLEMS, 8)
    texts = ["Question: 1+1?\nAnswer:", "Question:  6+6?\n\nAnswer:"]
    assert [policy.tokenizer.decode(ids) for ids in prompts] == ["<s>" * front + text for text in texts]
    experts = expert_rollouts(policy, TASK, prompts, [[problem] for problem in PROBLEMS])
    written = [policy.tokenizer.decode(ids[mask]) for ids, mask in zip(experts.ids[:, 0], experts.mask[:, 0])]
    assert written == [" 2</s>", " 12</s>"] and common.decode(policy, experts) == [[" 2"], [" 12"]]
    assert encode_prompts(policy, TASK, [], 8) == []
    # A space follows a word, not a newline. Of characters: test_suspects.py.
    assert texts_read(policy.tokenizer, Task("toy", [], [], None), PROBLEMS) == (["1+1?", " 6+6?\n"], [" ", ""])


@pytest.mark.parametrize("template", [None, PHI])
def test_an_expert_has_the_tokens_that_it_has_behind_its_prompt(template):
    """Llama's tokenizers put a space in front of a text: a program read alone would be indented by one."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127)), "\n", "<|end|>", "\u2581de", "\u2581d", "de"]
    words += sorted({f"<0x{byte:02X}>" for byte in "é😀".encode()})
    merges = [("\u2581", "d"), ("\u2581d", "e"), ("d", "e")]
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(words)}, merges, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    policy = policy_of(tokenizer)
    prompts = encode_prompts(policy, TASK, PROBLEMS[:1], 8)
    experts = expert_rollouts(policy, TASK, prompts, [[replace(PROBLEMS[0], solution="de f\n  g")]])
    space = "" if template else " "  # which follows "Answer:"
    assert common.decode(policy, experts) == [[f"{space}de f\n  g"]]
    first = tokenizer.convert_ids_to_tokens(experts.ids[0, 0].tolist())[0]
    assert first == ("de" if template else "\u2581de")
    prompt, whole = tokenizer(["de é", "de é😀 de"], add_special_tokens=False).input_ids  # "é" and "😀" are bytes
    ids = torch.tensor([[whole[len(prompt) :]]])
    assert common.decode(policy, common.Rollouts([prompt], ids, ids >= 0, ids, 1.0)) == [["😀 de"]]


def test_an_expert_that_is_too_long_is_refused():
    """Its space and its end token count: the context has 200 tokens."""
    policy, problem = policy_of(tokenizer_of(None)), PROBLEMS[0]
    short, long, longer = ([replace(problem, solution="2" * digits)] for digits in (1, 8, 9))
    assert expert_rollouts(policy, TASK, [[5] * 190] * 2, [short, long]).ids.shape == (2, 1, 10)
    with pytest.raises(BadInput, match="a prompt and its expert response, 201 tokens, exceed the model's context"):
        expert_rollouts(policy, TASK, [[5] * 190] * 2, [short, longer])


def test_half_a_character_is_refused():
    policy, problem = policy_of(tokenizer_of(None)), replace(PROBLEMS[0], solution="1\ud8002")
    with pytest.raises(BadInput, match=r"\\nAnswer: 1\\ud800' ends in half a character, which no tokenizer reads"):
        expert_rollouts(policy, TASK, [[5]], [[problem]])


def test_which_tokens_end_a_response():
    """Gemma has newlines as added tokens. The first other one ends a turn, special or not; what follows does not. The
    ends of a generation config count and need not be there."""
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "\n\n[end]<|im_start|>"), QWEN)
    tokenizer.add_tokens(["\n\n", "[end]"])
    assert tokenizer.convert_ids_to_tokens(policy_of(tokenizer).stop_ids) == ["[end]", "<|endoftext|>"]
    tokenizer = tokenizer_of(None)
    assert ends_of_response(tokenizer, None) == [tokenizer.eos_token_id]
    for ends, own in (([7, 3, 7], [7, 3]), (0, [0])):
        assert ends_of_response(tokenizer, GenerationConfig(eos_token_id=ends)) == [tokenizer.eos_token_id, *own]
    tokenizer.eos_token = None
    assert ends_of_response(tokenizer, GenerationConfig()) == []


def test_a_template_is_not_rendered_once_a_problem(noted):
    policy = policy_of(tokenizer_of(GEMMA, "<bos> <eos> <start_of_turn> <end_of_turn>"))
    rendered = noted(policy.tokenizer, "apply_chat_template", lambda *_, **__: None)
    prompts = encode_prompts(policy, TASK, PROBLEMS * 50, 8)
    expert_rollouts(policy, TASK, prompts, [[problem] for problem in PROBLEMS * 50])
    assert len(rendered) == 6  # what is read, a whole turn, and one problem: for the prompts, and for the responses


BROKEN = {
    "{{ raise_exception('no\nsystem prompt') }}": r"cannot be rendered \(TemplateError: no system prompt\): mend it",
    "{% for m in messages %}{{ m.content / 2 }}{% endfor %}": r"cannot be rendered \(TypeError: unsupported operand",
    "{% if %}": "cannot be rendered",
    "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}": "does not write the user's",
    "{{ messages[0].content | tojson }}": r"the chat template rewrites '1\+1\?\\n\\nBe brief.': mend it",
}


@pytest.mark.parametrize("template, complaint", BROKEN.items(), ids=BROKEN)
def test_a_template_that_fails_is_refused_in_one_line(template, complaint):
    with pytest.raises(BadInput, match=complaint) as refusal:
        encode_prompts(policy_of(tokenizer_of(template)), TASK, PROBLEMS, 8)
    assert "\n" not in str(refusal.value)


def test_no_chat_ignores_the_template(run, tmp_path, monkeypatch):
    """A base model that ships a template is trained without it, and the policy is saved without it."""
    model = save_untrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<unk>{% endfor %}"
    tokenizer.save_pretrained(model)
    task = Task("toy", [], [], None)
    assert harness.policy.load_policy(model, task, "cpu").stop_ids == [2, 1]  # <unk>, <eos>
    assert harness.policy.load_policy(model, task, "cpu", chat=False).stop_ids == [1]
    shown = run("pass_at_k_pg.py", *SMALL, "--model", model, "--show-prompt").stdout
    plain = run("pass_at_k_pg.py", *SMALL, "--model", model, "--show-prompt", "--no-chat").stdout
    assert shown == f"user: {plain.strip()}<unk>\n" and plain.strip().endswith("=") and not Path("runs").exists()
    run("pass_at_k_pg.py", *SMALL, "--model", model, "--no-chat", "--run-name", "a", code=0)
    assert json.loads(Path("runs/a/args.json").read_text())["chat"] is False
    assert run("pass_at_k_pg.py", *SMALL, "--model", "runs/a/policy", "--show-prompt").stdout == plain

    def told(*_, chat, **others):
        raise BadInput(f"chat is {chat}")

    monkeypatch.setattr("verifiers.learned.trained_verifier", told)
    flags = [*SMALL, "--verifier", "learned", "--model", model]
    assert run("bon_rl.py", *flags, "--no-chat").stderr.endswith("error: chat is False\n")
    assert run("bon_rl.py", *flags).stderr.endswith("error: chat is True\n")
