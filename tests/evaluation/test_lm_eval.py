"""Models on lm-eval's tasks: a local task file, a local data file, no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clearhead as ch
from clearhead import cli
from clearhead.data.tokenizer import ByteTokenizer
from clearhead.errors import UserError

PLAYS = Path(__file__).parents[1] / "data" / "fixtures" / "plays"
CONTEXT = 16

QUESTIONS = [
    {"question": "To be, or", "choices": [" not to be", " to sleep"], "answer": 0},
    {"question": "Good", "choices": [" night", " grief, my lord"], "answer": 1},
    {"question": "O", "choices": [" Romeo", "xxxx"], "answer": 0},
]
CHOICE = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = """
task: documents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}{{{{choices[0]}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


def model(**keywords: Any) -> Any:
    torch.manual_seed(3)
    config = ch.ModelConfig(
        vocab_size=257, width=16, layers=2, heads=2, context=CONTEXT, **({"attention": "laser"} | keywords)
    )
    return ch.build_model(config).eval()


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.fixture
def language_model() -> Any:
    pytest.importorskip("lm_eval")
    from clearhead.evaluation.lm_model import ClearheadLM

    return ClearheadLM(model=model(), tokenizer=ByteTokenizer(), batch_size=2)


def by_hand(module: Any, ids: list[int], last: int) -> tuple[float, bool]:
    """log p of the last tokens of `ids`, one forward for each of them."""
    total, greedy = 0.0, True
    with torch.no_grad():
        for end in range(len(ids) - last, len(ids)):
            logits = module(torch.tensor([ids[max(0, end - CONTEXT) : end]]))[0, -1].double()
            total += float(logits.log_softmax(-1)[ids[end]])
            greedy &= int(logits.argmax()) == ids[end]
    return total, greedy


def test_loglikelihood_is_the_sum_over_the_continuation(language_model: Any) -> None:
    pairs = [("to be", " or"), ("", "not"), ("a", "b"), ("the end", " x")]
    found = language_model.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = [256, *context.encode(), *continuation.encode()]
        want, likeliest = by_hand(language_model.model, ids, len(continuation))
        assert total == pytest.approx(want, abs=1e-4)
        assert greedy == likeliest


def test_a_greedy_continuation_is_told(language_model: Any) -> None:
    ids = [256, *b"to"]
    with torch.no_grad():
        best = int(language_model.model(torch.tensor([ids]))[0, -1].argmax())
    (answer,) = language_model._loglikelihood_tokens([(None, ids, [best])])
    assert answer[1]
    (other,) = language_model._loglikelihood_tokens([(None, ids, [(best + 1) % 257])])
    assert not other[1]
    assert other[0] < answer[0]


def test_a_long_text_is_cut_on_the_left(language_model: Any) -> None:
    """The model sees the last tokens before the continuation, as many as its context."""
    context, continuation = "x" * 5 + "abcdefghijklm", " nop"
    (found,) = language_model.loglikelihood([asked(context, continuation)])
    edited = "y" * 5 + context[5:]
    assert language_model.loglikelihood([asked(edited, continuation)])[0] == found
    ids = [256, *context.encode(), *continuation.encode()][-(CONTEXT + 1) :]
    with torch.no_grad():
        logits = language_model.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    want = sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(continuation), len(ids)))
    assert found[0] == pytest.approx(want, abs=1e-4)
    with pytest.raises(UserError, match="a continuation of 17 tokens, and the model sees 16"):
        language_model.loglikelihood([asked("a", "b" * 17)])


def test_documents_are_read_in_windows_that_score_each_token_once(language_model: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    (short, found) = language_model.loglikelihood_rolling([asked(text[:9]), asked(text)])
    ids, want = [256, *text.encode()], 0.0
    for start in range(0, len(text) - CONTEXT, CONTEXT):  # each with the token before it as all the context it gets
        want += by_hand(language_model.model, ids[start : start + CONTEXT + 1], CONTEXT)[0]
    want += by_hand(language_model.model, ids[-(CONTEXT + 1) :], len(text) % CONTEXT)[0]  # the last: a full context
    assert found == pytest.approx(want, abs=1e-3)
    assert short == pytest.approx(by_hand(language_model.model, ids[:10], 9)[0], abs=1e-4)


def test_generation_is_greedy_and_ends_at_a_stop(language_model: Any) -> None:
    request = ("to b", {"until": [], "max_gen_toks": 6})
    (text,) = language_model.generate_until([asked(*request)])
    tokens = [256, *b"to b"]
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(language_model.model(torch.tensor([tokens]))[0, -1].argmax()))
    assert text == ByteTokenizer().decode(tokens[5:])
    if len(text) > 2:
        (cut,) = language_model.generate_until([asked("to b", {"until": [text[2]], "max_gen_toks": 6})])
        assert cut == text.partition(text[2])[0]
    sample = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
    assert language_model.generate_until([asked("to b", sample)]) == language_model.generate_until(
        [asked("to b", sample)]
    )
    with pytest.raises(UserError, match="max_gen_toks=16 leaves no room"):
        language_model.generate_until([asked("to b", {"max_gen_toks": 16})])
    with pytest.raises(UserError, match="keywords that clearhead does not have: num_beams"):
        language_model.generate_until([asked("to b", {"num_beams": 2})])


def test_what_it_is_not_for() -> None:
    pytest.importorskip("lm_eval")
    from clearhead.evaluation.lm_model import ClearheadLM

    with pytest.raises(UserError, match="give the folder of a run, or a model"):
        ClearheadLM()
    with pytest.raises(UserError, match="reads segment by segment"):
        ClearheadLM(model=model(memory="full:16", position="xl", attention="softmax"), tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="context: expected 1 to 16, got 17"):
        ClearheadLM(model=model(), tokenizer=ByteTokenizer(), context=17)


# ---- tasks ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of three steps, and a folder of two tasks over one data file."""
    pytest.importorskip("lm_eval")
    base = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_DATA", str(base / "data"))
        arguments = ["--data", str(PLAYS), "--model", "tiny", "--model.width", "16", "--model.layers", "1"]
        arguments += ["--context", "64", "--steps", "3", "--train.threads", "1"]
        assert cli.main(["train", "--out", str(base / "run"), *arguments]) == 0
    (base / "tasks").mkdir()
    (base / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in (("choices", CHOICE), ("documents", DOCUMENTS)):
        filled = text.format(data=base / "q.jsonl", cache=base / "cache")
        (base / "tasks" / f"{name}.yaml").write_text(filled)
    return base


def test_a_run_on_tasks_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(folder / "run"), "--tasks", "choices", "documents"]
    arguments += ["--tasks-folder", str(folder / "tasks"), "--device", "cpu"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = {(s["task"], s["metric"]): s for s in found["scores"]}
    assert found["context"] == 64

    from clearhead.evaluation.lm_model import ClearheadLM

    own = ClearheadLM(folder / "run", device="cpu")
    right = nats = size = 0.0
    for q in QUESTIONS:
        totals = [own.loglikelihood([asked(q["question"], choice)])[0][0] for choice in q["choices"]]
        right += totals.index(max(totals)) == q["answer"]
        text = q["question"] + q["choices"][0]
        nats -= own.loglikelihood_rolling([asked(text)])[0]
        size += len(text.encode())
    accuracy = scores["choices", "acc"]
    assert accuracy["value"] == pytest.approx(right / 3)
    assert accuracy["samples"] == 3
    assert accuracy["error"] is not None
    bits = scores["documents", "bits_per_byte"]["value"]
    assert bits == pytest.approx(nats / size / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert cli.main([*arguments, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "bits_per_byte" in shown
    assert "context 64" in shown


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


def test_mistakes_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tasks = str(folder / "run"), str(folder / "tasks")
    given = ("--tasks-folder", tasks)
    assert "--stride means nothing with --tasks" in complaint(
        capsys, run, "--tasks", "choices", *given, "--stride", "8"
    )
    assert "--limit belongs to --tasks" in complaint(capsys, run, "--limit", "3")
    assert "no such folder" in complaint(capsys, run, "--tasks", "choices", "--tasks-folder", "nowhere")
    (folder / "bad").mkdir(exist_ok=True)
    text = CHOICE.format(data=folder / "missing.jsonl", cache=folder / "cache").replace("task: choices", "task: bad")
    (folder / "bad" / "bad.yaml").write_text(text)
    line = complaint(capsys, run, "--tasks", "bad", "--tasks-folder", str(folder / "bad"))
    assert "could not read the data of bad" in line


@pytest.mark.full  # reads the 14,000 tasks of lm-eval
def test_an_unknown_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, str(folder / "run"), "--tasks", "choises", "--tasks-folder", str(folder / "tasks"))
    assert "no task 'choises'" in line


def test_without_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("clearhead.evaluation.command.find_spec", lambda name: None)
    assert "pip install 'clearhead[eval]'" in complaint(capsys, str(tmp_path), "--tasks", "choices")


# ---- patched Hugging Face models ----


def test_a_patched_hugging_face_model_goes_in_as_it_is() -> None:
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from lm_eval.models.huggingface import HFLM

    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .")} | {"[end]": 28}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="."))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[end]", pad_token="[end]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, eos_token_id=28, bos_token_id=28, pad_token_id=28,
    )  # fmt: skip
    hugging = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in hugging.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    before = hugging(torch.tensor([[1, 2, 3]])).logits
    ch.hf.patch(hugging, "laser")
    lm = HFLM(pretrained=hugging, tokenizer=tokenizer, batch_size=2, max_length=32)
    assert not torch.allclose(hugging(torch.tensor([[1, 2, 3]])).logits, before, atol=1e-3)
    pairs = [("to be", " or"), ("a longer text than that", " x"), ("ab", "c")]
    found = lm.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (total, _) in zip(pairs, found, strict=True):
        ids = [letters[c] for c in context + continuation]
        with torch.no_grad():
            logits = hugging(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids)))
        assert total == pytest.approx(want, abs=1e-4)
