"""Fine-tuning: a tiny random Llama through the same trainer, checkpoints, comparison and command as any model."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from clearhead.errors import UserError
from clearhead.train import checkpoint as store
from clearhead.train.config import RunConfig
from clearhead.train.finetune import finetune_config
from clearhead.train.loop import train
from tests.hf.tiny_lm import POSITIONS, write_model, write_texts
from tests.train.test_killed import kill_after, start
from tests.train.test_loop import losses, weights

pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="pip install 'clearhead[hf]'")

SPECS = ("softmax", "softmax+selective", "softmax+learned")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, text):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", text)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_DATA", str(tmp_path_factory.mktemp("prepared")))
        yield


@pytest.fixture(scope="module")
def config(tiny, text):
    def make(attention: str = "softmax+selective", **changes) -> RunConfig:
        loop = {
            "batch_size": 2, "eval_every": 6, "eval_tokens": 256, "test_tokens": 512, "checkpoint_every": 4,
            "threads": 1,
        }  # fmt: skip
        made = finetune_config(
            str(tiny),
            attention=attention,
            data=str(text),
            context=32,
            steps=changes.pop("steps", 12),
            tune=changes.pop("tune", "lora"),
            model=changes.pop("model", None),
            optim=changes.pop("optim", {"lr": 1e-2}),
            train=loop | changes,
        )
        return dataclasses.replace(made, data=dataclasses.replace(made.data, val_fraction=0.2, test_fraction=0.2))

    return make


@pytest.fixture(scope="module")
def plain(tiny):
    from clearhead.hf.model import read_model

    return read_model(tiny, torch.float32).eval()


def begin(config: RunConfig, seed: int = 0):
    from clearhead.hf.model import Pretrained

    return Pretrained.begin(config.model, seed)


def ids(n: int = 24, rows: int = 2) -> torch.Tensor:
    return torch.randint(2, 290, (rows, n), generator=torch.Generator().manual_seed(3))


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_model_s_tokenizer_gives_text_back_and_counts_its_bytes(config, text):
    from clearhead.data.text import prepare

    data = prepare(config().data)
    assert data.tokenizer.separator == 1
    document = data.documents("test")[0]
    original = (text / f"{document.name}.txt").read_text()
    assert data.tokenizer.decode(document.tokens[1:]) == original
    assert document.bytes == len(original.encode())
    assert document.tokens[0] == 1
    assert not (document.tokens[1:] == 1).any()
    assert data.tokenizer.decode(data.tokenizer.encode("a <|endoftext|> b")) == "a <|endoftext|> b"
    assert 1 not in data.tokenizer.encode("a <|endoftext|> b")


def test_the_tokenizer_of_a_run_is_read_back_without_the_model(config, tmp_path):
    from clearhead.data.text import prepare
    from clearhead.data.tokenizer import load_tokenizer

    tokenizer = prepare(config().data).tokenizer
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, 1)
    assert again.encode("abc def").tolist() == tokenizer.encode("abc def").tolist()


def test_another_tokenizer_is_another_text(config, tiny, tmp_path):
    from clearhead.data.text import prepare

    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    values = json.loads((other / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(values))
    data = config().data
    assert prepare(dataclasses.replace(data, tokenizer_of=str(other))).fingerprint != prepare(data).fingerprint


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_before_the_first_step_it_is_the_pretrained_model(config, plain, spec):
    model = begin(config(spec)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), plain(ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", [*SPECS, "laser", "self_adjust", "softmax+window:5"])
def test_packed_documents_are_apart(config, spec):
    """Each document gives the logits that it gives alone, whatever stands before it."""
    model, tokens = begin(config(spec)).eval(), ids()
    segments = torch.tensor([[0] * 5 + [1] * 19, [0] * 1 + [1] * 1 + [2] * 22])
    with torch.no_grad():
        packed = model(tokens, segments=segments)
        for row, cuts in enumerate(((0, 5, 24), (0, 1, 2, 24))):
            for first, last in pairwise(cuts):
                alone = model(tokens[row : row + 1, first:last])[0]
                torch.testing.assert_close(packed[row, first:last], alone, rtol=1e-4, atol=1e-5)


def test_what_learns_and_nothing_else_is_in_the_state_and_gets_a_gradient(config):
    for tune, spec, expected in (
        ("lora", "softmax", {"lora"}),
        ("lora", "softmax+selective", {"lora", "temperature"}),
        ("temperature", "softmax+learned", {"temperature"}),
        ("full", "softmax+selective", {"matrices", "no_decay", "temperature"}),
    ):
        run = config(spec, tune=tune)
        model = begin(run)
        groups = {group["name"]: group for group in model.parameter_groups()}
        assert groups.keys() == expected
        listed = {id(p) for group in groups.values() for p in group["params"]}
        assert listed == {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in model.state_dict(keep_vars=True).values()} == listed
        assert model.count_parameters()["trained"] == sum(p.numel() for g in groups.values() for p in g["params"])
        model(ids()).logsumexp(-1).sum().backward()
        assert all((p.grad is not None) == (id(p) in listed) for p in model.parameters())
        if "temperature" in groups:
            assert groups["temperature"]["weight_decay_scale"] == 0
            rate = groups["temperature"]["lr_scale"] * {"lora": 5e-4, "temperature": 5e-3, "full": 2e-5}[tune]
            assert rate == pytest.approx(5e-3)
            assert any(p.grad.abs().max() > 0 for p in groups["temperature"]["params"])


def test_arms_share_lora_s_start_and_seeds_do_not(config):
    def start_of(spec: str, seed: int) -> dict[str, torch.Tensor]:
        return {name: p for name, p in begin(config(spec), seed).named_parameters() if "lora_A" in name}

    first, same, other = start_of("softmax", 0), start_of("softmax+selective", 0), start_of("softmax", 1)
    assert first.keys() == same.keys()
    for name, value in first.items():
        assert torch.equal(value, same[name])
        assert not torch.equal(value, other[name])


def test_gradient_checkpointing_and_bf16_weights_change_no_more_than_rounding(config):
    def gradients(**options) -> dict[str, torch.Tensor]:
        model = begin(config(model=options))
        with torch.no_grad():  # LoRA begins at zero, where half of the gradients are none
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) * 0.02)
        model(ids()).float().logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    wanted = gradients()
    for name, found in gradients(gradient_checkpointing=True).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-5)
    halves = gradients(weights="bf16")
    assert {value.dtype for value in halves.values()} == {torch.float32}
    whole, coarse = (torch.cat([v.flatten() for v in values.values()]) for values in (wanted, halves))
    assert (coarse - whole).norm() < 0.1 * whole.norm()


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(), run, progress=False)
    return run


def test_a_run_begins_with_the_pretrained_score_and_learns(config, finished, plain):
    from clearhead.data.text import prepare
    from clearhead.train.evaluate import evaluate

    summary = json.loads((finished / "result.json").read_text())["summary"]
    curve = summary["val_curve"]
    assert [point["step"] for point in curve] == [0, 6, 12]
    data = prepare(config().data)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = plain

        def forward(self, tokens):
            return self.model(tokens).logits

    zero_shot = evaluate(Logits(), data, "val", max_tokens=256)
    assert curve[0]["bits_per_byte"] == pytest.approx(zero_shot.bits_per_byte, rel=1e-5)
    assert curve[-1]["bits_per_byte"] < curve[0]["bits_per_byte"]
    assert summary["test_bits_per_byte"] == pytest.approx(
        sum(d["nats"] for d in summary["test_documents"])
        / sum(d["bytes"] for d in summary["test_documents"])
        / np.log(2)
    )
    assert summary["parameters"]["trained"] < summary["parameters"]["total"]
    stored = store.read(store.newest_model(finished)).tensors[store.MODEL]
    assert sum(t.numel() for t in stored.values()) == summary["parameters"]["trained"]


def test_killed_and_resumed_equals_never_stopped(config, finished, tmp_path):
    run = tmp_path / "killed"
    kill_after(start(run, config(), "slow"), run, 6, within=300)  # it imports transformers and peft first
    train(config(), run, progress=False)
    assert weights(run) == weights(finished)
    assert losses(run) == losses(finished)


def test_another_base_model_is_refused(config, tiny, text, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    run = config(steps=2, checkpoint_every=1)
    free = dataclasses.replace(run.model, source=str(own), base="")
    run = dataclasses.replace(run, model=free, data=dataclasses.replace(run.data, tokenizer_of=str(own)))

    def stop(event):
        if event["kind"] == "checkpoint":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(run, tmp_path / "run", progress=False, on_event=stop)
    shutil.rmtree(own)
    write_model(own, text, seed=1)
    with pytest.raises(UserError, match=r"pretrained weights of .* have changed"):
        train(run, tmp_path / "run", progress=False)
    pinned = dataclasses.replace(run, model=dataclasses.replace(run.model, base=config().model.base))
    with pytest.raises(UserError, match="are not those that this run began from"):
        train(pinned, tmp_path / "pinned", progress=False)


def test_exported_and_read_in_another_process_it_gives_the_same_logits(finished, tmp_path):
    from clearhead.hf.export import export_run
    from clearhead.models.io import load_model

    model = load_model(store.newest_model(finished))
    with torch.no_grad():
        wanted = model(ids())
    export_run(finished, tmp_path / "merged")
    export_run(finished, tmp_path / "beside", merge=False)
    torch.save(ids(), tmp_path / "ids.pt")
    script = """
import sys, torch
from pathlib import Path
import clearhead as ch
from peft import PeftModel
here, ids = Path(sys.argv[1]), torch.load(Path(sys.argv[1]) / "ids.pt")
merged, beside = ch.hf.load(here / "merged").eval(), ch.hf.load(here / "beside")
with torch.no_grad():
    zero_shot = beside.eval()(ids).logits
    beside = PeftModel.from_pretrained(beside, here / "beside" / "adapter").eval()
    torch.save({"merged": merged(ids).logits, "beside": beside(ids).logits, "without": zero_shot}, here / "out.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, timeout=120)
    found = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(found["merged"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["beside"], wanted, rtol=1e-5, atol=1e-6)
    assert (found["without"] - wanted).abs().max() > 1e-3  # LoRA has learned something
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    with pytest.raises(UserError, match="exists"):
        export_run(finished, tmp_path / "merged")


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Train in this process instead of in workers, whose start costs seconds."""
    from clearhead.compare import pool, probe, run
    from clearhead.compare.plan import ComparePlan

    def run_here(tasks, workers, *, on_tick=None, on_end=None):
        for task in tasks:
            train(RunConfig.from_dict(task.config), task.folder, progress=False)
            on_end(task, 0)

    def measure_here(layout, console):
        if not layout.probe.exists():
            pool.write_json(layout.probe, probe.probe(ComparePlan.load(layout.folder)))
        return json.loads(layout.probe.read_text())["arms"]

    monkeypatch.setattr(probe, "ROUNDS", 1)
    monkeypatch.setattr(probe, "WARM_UP", 1)
    monkeypatch.setattr(run, "run_tasks", run_here)
    monkeypatch.setattr(run, "measure_speed", measure_here)


SMALL = ("data.val_fraction=0.2", "data.test_fraction=0.2", "train.eval_tokens=256", "train.test_tokens=512")


def test_arms_begin_equal_and_are_judged_in_the_usual_report(in_process, tiny, text, tmp_path):
    from clearhead.compare.plan import ComparePlan
    from clearhead.compare.run import compare

    plan = ComparePlan.build(
        model=str(tiny), attention=SPECS[:2], seeds=2, steps=4, context=32, data=str(text), overrides=SMALL, workers=1
    )
    assert plan.base.model.base  # the very weights are part of the plan
    results = compare(plan, tmp_path / "compare", progress=False)
    assert results["complete"]
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    first = {
        (arm, seed): json.loads((tmp_path / f"compare/runs/{arm}/seed{seed}/result.json").read_text())["summary"]
        for arm in SPECS[:2]
        for seed in (0, 1)
    }
    zero_shot = {key: summary["val_curve"][0]["bits_per_byte"] for key, summary in first.items()}
    assert len({round(value, 4) for value in zero_shot.values()}) == 1  # no seed and no arm has moved yet
    arm = results["arms"][1]
    assert arm["comparison"]["interval"]["low"] < arm["comparison"]["mean"] < arm["comparison"]["interval"]["high"]
    temperatures = arm["setup"]["parameters"]["temperature"]
    assert 0 < temperatures < 0.01 * arm["setup"]["parameters"]["total"]
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "softmax+selective" in page
    assert ComparePlan.load(tmp_path / "compare").identity() == plan.identity()


def test_the_default_plan_of_a_model(tiny, text):
    from clearhead.compare.plan import ComparePlan

    plan = ComparePlan.build(model=str(tiny), context=32, data=str(text))
    assert [arm.name for arm in plan.arms] == list(SPECS)
    assert (len(plan.seeds), plan.preset) == (3, "finetune")
    assert {arm.apply(plan.base).optim.lr for arm in plan.arms} == {5e-4}
    with pytest.raises(UserError, match="every arm begins from the same model"):
        ComparePlan.build(model=str(tiny), context=32, arms=["a: model.source=other", "b:"])


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words) -> int:
    from clearhead.cli import main

    return main([str(word) for word in words])


def test_the_command_trains_exports_scores_and_writes(tiny, text, tmp_path, capfd):
    run, target = tmp_path / "run", tmp_path / "model"
    words = ("finetune", "--model", tiny, "--data", text, "--context", 32, "--steps", 2, "--out", run, "--set", *SMALL)
    assert command(*words, "--export", target) == 0
    out, err = capfd.readouterr()
    assert "bits per byte on the test text" in out
    assert "before the first step" in out
    assert "step 0: validation" in err
    assert str(target) in err
    assert command(*words) == 0  # the same command finds it done
    assert command("evaluate", run, "--json", "--tokens", 512) == 0
    out = capfd.readouterr().out
    scored = json.loads(out[out.index("{\n") :])
    summary = json.loads((run / "result.json").read_text())["summary"]
    assert scored["bits_per_byte"] == pytest.approx(summary["test_bits_per_byte"], rel=1e-5)
    assert command("generate", run, "--prompt", "abc", "--tokens", 8) == 0
    first = capfd.readouterr().out
    assert command("generate", run, "--prompt", "abc", "--tokens", 8) == 0
    assert capfd.readouterr().out == first
    assert first.startswith("abc")
    assert command("inspect", "--model", run) == 2
    assert "--export FOLDER" in capfd.readouterr().err


def test_every_command_of_the_page_runs(in_process, tiny, text, tmp_path, monkeypatch, capfd):
    page = Path(__file__).parents[2] / "docs" / "finetune.md"
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    clearhead ")]
    assert {line.split()[1] for line in lines} == {"data", "finetune", "evaluate", "generate", "compare"}
    monkeypatch.chdir(tmp_path)
    short = ["--data", text, "--context", 32, "--steps", 2, "--set", *SMALL]
    for line in lines:
        words = [tiny if word == "smollm2" else word for word in shlex.split(line)[1:]]
        if words[0] == "data":  # fetches 92 MB
            continue
        for flag in ("--data",):
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        words += {"finetune": short, "compare": [*short, "--seeds", 2]}.get(words[0], [])
        assert command(*words) == 0, (line, capfd.readouterr().err)
    assert (tmp_path / "my-smollm2" / "clearhead.json").exists()


def test_the_examples_in_the_help_are_valid(tiny, monkeypatch):
    from clearhead import _options
    from clearhead._arguments import merge, parse
    from clearhead._finetune_command import finetune_run

    plans = []
    monkeypatch.setattr("clearhead.compare.run.compare", plans.append)
    names = ("smollm2", "./my-model")
    for line in filter(None, map(str.strip, _options.Finetune.EXAMPLES.splitlines())):
        words = [str(tiny) if word in names else word for word in shlex.split(line)]
        if words[1] == "finetune":
            run, folder = finetune_run(parse(_options.Finetune, "finetune", merge(words[2:], "--set")))
            assert run.model.source == str(tiny)
            assert folder.name.startswith("finetune-tiny-")
    for line in filter(lambda line: "--model " in line, _options.Compare.EXAMPLES.splitlines()):
        assert command(*[tiny if word in names else word for word in shlex.split(line)[1:]]) == 0
    assert len(plans) == 2


def test_the_recipe_for_a_gpu_builds(tiny, text):
    from recipes.finetune_smollm2 import plan

    for tune, arms in (("lora", 3), ("full", 3), ("temperature", 2)):
        made = plan(tune, model=str(tiny), data=str(text), context=32)
        assert len(made.arms) == arms
        assert made.base.train.precision == "bf16"


WRONG = {
    "unknown name": (("--model", "smollm3"), "smollm3"),
    "no such folder": (("--model", "./nowhere"), "no such folder"),
    "no model": (("--model", "{text}"), "config.json is missing"),
    "an encoder": (("--model", "{encoder}"), "no causal language model: its class is BertModel"),
    "no tokenizer": (("--model", "{bare}"), "has no tokenizer.json"),
    "too long": (("--context", POSITIONS + 1), f"longer than the {POSITIONS} positions"),
    "unknown spec": (("--attention", "sofmax"), "did you mean 'softmax'"),
    "nothing learns": (("--attention", "softmax", "--tune", "temperature"), "nothing would learn"),
    "no such module": (("--lora-targets", "nowhere"), "name modules of the model"),
    "unknown key": (("--set", "model.lora_rang=3"), "did you mean 'model.lora_rank'"),
    "export exists": (("--export", "{text}"), "exists"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(case, tiny, text, tmp_path, capfd):
    words, expected = WRONG[case]
    encoder, bare = tmp_path / "encoder", tmp_path / "bare"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    shutil.copytree(tiny, bare)
    (bare / "tokenizer.json").unlink()
    words = [str(word).format(text=text, encoder=encoder, bare=bare) for word in words]
    base = ["--model", tiny, "--data", text, "--context", 32, "--steps", 2, "--out", tmp_path / "run", "--set", *SMALL]
    if "--set" in words:
        base = base[: base.index("--set")]
    for flag in ("--model", "--context"):
        if flag in words:
            place = base.index(flag)
            del base[place : place + 2]
    assert command("finetune", *base, *words) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("clearhead: ")
    assert expected in error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("missing", "expected"), [("peft", "tune=lora needs the peft"), ("transformers", "hf]")])
def test_a_missing_library_is_named_with_the_command(missing, expected, tiny, text, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, missing, None)
    words = ("--data", text, "--context", 32, "--steps", 2, "--out", tmp_path / "run", "--set", *SMALL)
    assert command("finetune", "--model", tiny, *words) == 2
    assert expected in capfd.readouterr().err


# ---- the real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from clearhead.data.models import model_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CLEARHEAD_DATA", raising=False)
        try:
            return model_folder("smollm2")
        except UserError as error:
            pytest.skip(str(error))


@pytest.mark.full
@pytest.mark.parametrize("spec", SPECS)
def test_smollm2_patched_with_the_identity_has_the_same_loss_on_real_text(smollm2, spec):
    from clearhead.data.pretrained_tokenizer import PretrainedTokenizer
    from clearhead.hf.model import Pretrained, read_model
    from clearhead.models.pretrained_config import PretrainedConfig

    text = (
        "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex. Complex is "
        "better than complicated. Flat is better than nested. Sparse is better than dense. Readability counts. "
    )
    tokenizer = PretrainedTokenizer.of_model(str(smollm2))
    tokens = torch.tensor([[tokenizer.separator, *tokenizer.encode(text * 2)]])

    def loss(logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()

    with torch.no_grad():
        own = loss(read_model(smollm2, torch.float32).eval()(tokens).logits)
        patched = loss(Pretrained.begin(PretrainedConfig.of(str(smollm2), attention=spec)).eval()(tokens))
    assert patched == pytest.approx(own, abs=1e-5)
