import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clearhead import _arguments, cli
from clearhead.data.catalogue import CATALOGUE
from clearhead.errors import UserError
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.train.config import RunConfig

PLAYS = str(Path(__file__).parent / "data" / "fixtures" / "plays")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    """Run a command in this process; tyro ends its own mistakes by SystemExit."""
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code


def modules_after(*arguments):
    """Return what a fresh interpreter has imported after a command, and its exit code."""
    code = f"""
import json, sys
from clearhead.cli import main
try:
    code = main({list(arguments)!r})
except SystemExit as stop:
    code = stop.code
print("\\n" + json.dumps([code, sorted(m for m in sys.modules if "." not in m)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- help ----


def test_help_is_there_within_a_second():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "clearhead.cli", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.stdout == cli.HELP
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], 0),
        (["data", "list"], 0),
        (["explain", "lasr"], 2),
        (["train", "--out", "x", "--steps", "5", "--optim.warmup-steps", "5"], 2),
    ]
    + [([name, "--help"], 0) for name in cli.COMMANDS],
)
def test_help_and_early_mistakes_need_no_torch(arguments, expected):
    code, modules = modules_after(*arguments)
    assert code == expected
    assert "torch" not in modules
    assert "scipy" not in modules


def test_every_command_is_in_the_help_and_none_that_does_not_exist():
    listed = [line.split()[0] for line in cli.HELP.split("commands\n")[1].split("\n\n")[0].splitlines()]
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself_with_examples(name, capsys):
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert "examples" in text
    assert text.count(f"clearhead {name}") >= 3


def test_the_examples_of_train_and_compare_are_valid(monkeypatch):
    from clearhead import _options
    from clearhead.compare.plan import ComparePlan

    plans = []
    monkeypatch.setattr("clearhead.compare.run.compare", plans.append)
    monkeypatch.setattr("clearhead.compare.report.redraw", plans.append)
    # Measuring takes minutes: what is asked of it must be a plan without it too.
    monkeypatch.setattr("clearhead.compare.budget.sized", lambda minutes, **asked: ComparePlan.build(**asked))
    for line in filter(None, map(str.strip, _options.Compare.EXAMPLES.splitlines())):
        if "--model " in line:  # needs a pretrained model: see tests/hf/test_finetune.py
            continue
        assert run(*shlex.split(line)[1:]) == 0
    assert len(plans) == 8
    for line in filter(None, map(str.strip, _options.Train.EXAMPLES.splitlines())):
        words = shlex.split(line)
        config, folder = cli.train_config(words[words.index("train") + 1 :])
        assert isinstance(config, RunConfig)
        assert folder.parts[0] == "runs"


def test_every_field_of_the_configuration_is_an_option(capsys):
    run("train", "--help")
    text = capsys.readouterr().out
    for section in dataclasses.fields(RunConfig):
        kind = f"{section.name.capitalize()}Config"
        value = getattr(RunConfig.from_dict({"train": {"steps": 100}}), section.name)
        for entry in dataclasses.fields(value):
            shown = f"--{section.name}.{entry.name.replace('_', '-')}" in text
            assert shown == (entry.name not in _arguments.ELSEWHERE[kind])
    for option in ("--out", "--model STR", "--data STR", "--context", "--steps", "--tokens"):
        assert option in text


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["data", "fech", "x"], "unknown action of data 'fech' (did you mean 'fetch'?)"),
        (["data", "fetch"], "data fetch needs a name"),
        (["data", "path", "shakespere"], "unknown data set 'shakespere' (did you mean 'shakespeare'?)"),
        (["data", "path", "shakespeare"], "shakespeare is not here yet; run: clearhead data fetch shakespeare"),
        (["data", "list", "x"], "data list takes no name"),
        (["explain", "self_adjust+laser"], "LASER reads log(A exp V), which needs weights that sum to 1"),
        (["explain", "softmax", "--heads", "8", "--kv-heads", "3"], "8 and 3"),
        (["explain", "softmax", "--length", "0"], "expected sizes of at least 1"),
        (["train", "--out", "x", "--model", "tny"], "unknown size of --model 'tny' (did you mean 'tiny'?)"),
        (["train", "--out", "x", "--model.heads", "3"], "expected a multiple of heads=3, got 128"),
        (["train", "--out", "x", "--model.attention", "lasr"], "(did you mean 'laser'?)"),
        (["train", "--out", "x", "--steps", "5", "--tokens", "7"], "exactly one of steps and tokens"),
        (["train", "--out", "x", "--data", "absent.txt"], "no such file or folder: absent.txt"),
        (["evaluate", "nowhere"], "nowhere holds no run: config.json is missing"),
        (["generate", "nowhere"], "nowhere holds no run: config.json is missing"),
        (["compare", "--preset", "quik"], "unknown preset 'quik' (did you mean 'quick'?)"),
        (["compare", "--attention", "softmax", "lasr"], "(did you mean 'laser'?)"),
        (["compare", "--set", "model.widht=3"], "(did you mean 'model.width'?)"),
        (["compare", "--from", "nowhere"], "nowhere: no comparison there"),
        (["compare", "--from", "x", "--seeds", "3"], "--from redraws a comparison as it is"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("clearhead: ")
    assert message in lines[0]
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "softmax", "--lenght", "3"], "--length"),
        (["train", "--out", "x", "--model.attenton", "laser"], "--model.attention"),
        (["train", "--out", "x", "--model.layers", "many"], "--model.layers"),
        (["compare", "--sedes", "3"], "--seeds"),
        (["evaluate"], "RUN"),
    ],
)
def test_wrong_flags_are_answered_with_the_right_one(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_shows_the_help_and_is_a_mistake(capsys):
    assert run() == 2
    assert capsys.readouterr().out == cli.HELP


def test_version(capsys):
    from clearhead import __version__

    assert run("--version") == 0
    assert capsys.readouterr().out == f"clearhead {__version__}\n"


def test_a_bug_is_one_line_and_its_traceback_is_saved(monkeypatch, capsys, tmp_path):
    def broken(arguments):
        raise RuntimeError("first line\nsecond line [red]")

    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "data", broken)
    assert run("data", "list") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "unexpected RuntimeError: first line second line [red]; this is a bug" in line
    log = Path(line.split("the traceback is in ")[1]).read_text()
    assert "clearhead data list" in log
    assert "in broken" in log


def test_an_interruption_is_130_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "data", interrupted)
    assert run("data", "list") == 130
    assert capsys.readouterr().err == "clearhead: interrupted; the same command goes on\n"


def test_an_interrupted_training_is_130(monkeypatch, tmp_path):
    from clearhead.train.folder import RunResult

    result = RunResult("interrupted", "stopped", tmp_path, {})
    monkeypatch.setattr("clearhead.train.loop.train", lambda config, folder: result)
    assert run("train", "--out", "x") == 130


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "clearhead.cli", "data", "list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


# ---- reading arguments ----


def test_list_options_may_be_repeated():
    arguments = shlex.split("--arm a b --seeds 3 --arm=c --attention x -h")
    merged = _arguments.merge(arguments, "--arm", "--attention")
    assert merged == ["--seeds", "3", "-h", "--arm", "a", "b", "c", "--attention", "x"]


def test_given_looks_a_value_up():
    for arguments in (["--model", "tiny"], ["--model=tiny"], ["--out", "x", "--model", "tiny", "--model.layers", "3"]):
        assert _arguments.given(arguments, "--model") == "tiny"
    assert _arguments.given(["--model.layers", "3"], "--model") is None


def test_train_options_become_the_configuration(tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("x")
    config, folder = cli.train_config(
        shlex.split(
            "--out runs/a --model tiny --model.attention selective+laser --data my.txt --data.tokenizer bpe "
            "--data.vocab-size 300 --context 64 --tokens 100000 --optim.betas 0.8 0.9 --optim.clip-norm None "
            "--train.compile --model.no-tie-embeddings --train.seed=7"
        )
    )
    assert folder == Path("runs/a")
    assert config.model == dataclasses.replace(
        PRESETS["tiny"], attention="laser+selective", vocab_size=300, context=64, tie_embeddings=False
    )
    assert config.data.source == str(text)  # absolute: the run can be gone on with from anywhere
    assert (config.data.tokenizer, config.data.vocab_size, config.data.context) == ("bpe", 300, 64)
    assert (config.train.steps, config.train.tokens, config.train.compile, config.train.seed) == (None, 100000, True, 7)
    assert (config.optim.betas, config.optim.clip_norm) == ((0.8, 0.9), None)


def test_train_without_options_is_the_default_run():
    config, _ = cli.train_config(["--out", "x"])
    assert config.model == PRESETS["small"]
    assert config.data.source == "shakespeare"
    assert config.train.steps == 1000
    assert cli.train_config(["--out", "x", "--model", "large"])[0].model.vocab_size == 257  # bytes, whatever the size


def test_field_texts_are_what_stands_under_the_fields():
    texts = _arguments.field_texts(ModelConfig)
    assert texts["heads"] == "Number of query heads."
    assert all(texts.values())
    assert not any("\n" in text for text in texts.values())


def test_compare_options_become_the_plan(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr("clearhead.compare.run.compare", plans.append)
    (tmp_path / "my.txt").write_text("x")
    line = "compare --preset quick --attention softmax laser --attention self_adjust --seeds 4 --data my.txt"
    line += " --set model.width=96 --set model.heads=4 --steps 90 --baseline laser --out there --workers 1"
    assert run(*line.split(), "--arm", "gated: model.output_gate=head") == 0
    (plan,) = plans
    assert [arm.name for arm in plan.arms] == ["softmax", "laser", "self_adjust", "gated"]
    assert plan.seeds == (0, 1, 2, 3)
    assert plan.baseline == "laser"
    assert plan.base.data.source == str(tmp_path / "my.txt")
    assert (plan.base.model.width, plan.base.model.heads, plan.base.train.steps) == (96, 4, 90)
    assert (plan.folder, plan.workers, plan.preset) == (Path("there"), 1, "quick")


def test_compare_takes_a_context_and_a_generated_task(monkeypatch, capsys):
    plans = []
    monkeypatch.setattr("clearhead.compare.run.compare", plans.append)
    assert run("compare", "--preset", "quick", "--context", "96", "--data", "synthetic:recall,pairs=4") == 0
    base = plans[0].base
    assert (base.model.context, base.data.context, base.data.source) == (96, 96, "synthetic:recall,pairs=4")
    assert base.score == "bits_per_answer"
    assert run("compare", "--preset", "quick", "--context", "8", "--data", "synthetic:recall,pairs=4") == 2
    assert "synthetic:recall: needs at least 12 tokens, got 8" in capsys.readouterr().err


def test_compare_takes_a_grid_of_learning_rates(monkeypatch):
    plans = []
    monkeypatch.setattr("clearhead.compare.run.compare", plans.append)
    assert run("compare", "--preset", "quick", "--learning-rates", "1e-3", "4e-3", "--budget", "flops") == 0
    assert plans[0].learning_rates == (1e-3, 4e-3)
    assert plans[0].budget == "flops"


# ---- the commands themselves ----


def test_data_list_shows_every_set_with_its_licence(capsys):
    assert run("data", "list") == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in CATALOGUE.values():
        assert entry.name in text
        assert f"Licence: {entry.licence}." in text


def test_data_path_prints_the_folder_alone(capsys):
    assert run("data", "path", "python-stdlib") == 0
    assert (Path(capsys.readouterr().out.strip()) / "argparse.py").is_file()


def test_explain_lists_every_backend_and_one_chosen(capsys):
    from clearhead.attention.backends import BACKENDS

    assert run("explain", "laser+window:32", "--length", "128", "--padding", "--dtype", "bfloat16") == 0
    text = capsys.readouterr().out
    assert "laser+window:32: 2 x 8 heads x 128 x 64, bfloat16, cpu, causal, padded" in text
    for name in BACKENDS:
        assert name in text
    assert text.count("chosen") == 1


def test_explain_tells_what_a_memory_holds_in_each_layer(capsys):
    options = "--memory last:1,long=512,short=64 --layers 3 --segment 128 --heads 2 --head-dim 16 --batch 1"
    assert run("explain", "softmax", *options.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("│", " ").split() for line in lines if "│" in line]
    assert [row[:4] for row in rows] == [
        ["0", "64", "8,192", "128.5"],  # 64 tokens of width 32 in float32; 64 remembered and (128 + 1) / 2 of its own
        ["1", "64", "8,192", "128.5"],
        ["2", "512", "65,536", "576.5"],
        ["all", "640", "81,920", "833.5"],
    ]
    assert all(row[4] == "sdpa" for row in rows[:3])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("bigbird --memory full:8", "counts from a document's beginning"),
        ("performer --memory full:8", "keeps no keys"),
        ("softmax --memory full:8 --position learned", "carry the place of another one"),
        ("softmax --memory last:7", "7 long memories, but the model has 6 layers"),
        ("softmax --memory lats:1", "did you mean 'last'"),
        ("softmax --memory full:8 --padding", "leave the two options out"),
        ("softmax --segment 8", "--segment goes with --memory"),
    ],
)
def test_explain_says_why_a_memory_is_refused(options, says, capsys):
    assert run("explain", *options.split()) == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps, made by the command itself."""
    folder = tmp_path_factory.mktemp("run") / "first"
    command = [sys.executable, "-m", "clearhead.cli", "train", "--out", str(folder), "--data", PLAYS]
    command += shlex.split(
        "--model tiny --context 32 --steps 6 --optim.warmup-steps 2 --model.layers 1 --model.width 16 "
        "--train.threads 1 --train.batch-size 4 --train.test-tokens 500 --train.eval-tokens 500"
    )
    environment = os.environ | {"CLEARHEAD_DATA": str(tmp_path_factory.mktemp("data"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finished; ")
    assert "bits per byte on the test text" in done.stdout
    return folder


def test_evaluate_prints_documents_and_the_total(trained, capsys):
    assert run("evaluate", str(trained), "--split", "test", "--tokens", "600") == 0
    table = capsys.readouterr().out
    assert run("evaluate", str(trained), "--split", "test", "--tokens", "600", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["split"] == "test"
    assert values["context"] == 32
    assert f"{values['bits_per_byte']:.4f}" in table
    for document in values["documents"]:
        assert document["name"] in table
        assert f"{document['bits_per_byte']:.4f}" in table


def test_evaluate_by_length_scores_the_same_tokens_beyond_the_trained_context(trained, capsys):
    command = ["evaluate", str(trained), "--split", "train", "--tokens", "300", "--lengths", "64", "16", "32"]
    assert run(*command) == 0
    table = capsys.readouterr().out
    assert run(*command, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["trained_context"], values["stride"]) == (32, 8)
    assert [one["context"] for one in values["lengths"]] == [16, 32, 64]
    assert {one["tokens"] for one in values["lengths"]} == {values["tokens"]}
    for one in values["lengths"]:
        assert f"{one['bits_per_byte']:.4f}" in table
    assert "32 (trained)" in table


def test_evaluate_reads_other_text(trained, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("A line of other text.\n" * 100)
    assert run("evaluate", str(trained), "--data", "other.txt", "--split", "all", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["data"] == str(tmp_path / "other.txt")
    assert {document["name"] for document in values["documents"]} == {"other"}


def test_generate_repeats_with_its_seed_and_begins_with_the_prompt(trained, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert run("generate", str(trained), "--prompt", "ARIEL.", "--tokens", "60", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("ARIEL.") for text in texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--top-k", "0"], "top_k: expected at least 1"),
        (["generate", "--temperature", "-1"], "temperature: expected at least 0"),
        (["evaluate", "--stride", "999"], "expected 1 <= stride <= context"),
        (["evaluate", "--lengths", "32", "64", "--context", "16"], "--context means nothing with --lengths"),
        (["evaluate", "--lengths", "64", "--memory", "full:64"], "which a memory does"),
        (["evaluate", "--lengths", "64", "--stride", "99"], "expected 1 <= stride <= 64"),
        (["evaluate", "--data", "absent.txt"], "no such file or folder: absent.txt"),
    ],
)
def test_wrong_values_for_a_run_are_one_line(trained, arguments, message, capsys):
    assert run(arguments[0], str(trained), *arguments[1:]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # a line of progress may stand before it
    assert line.startswith("clearhead: ")
    assert message in line


def test_a_broken_checkpoint_is_one_line_and_stays_as_it_is(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (weights,) = copy.glob("checkpoint/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    before = weights.read_bytes()
    assert run("generate", str(copy)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.safetensors has" in line
    assert weights.read_bytes() == before


def test_a_user_error_in_any_room_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("more", "warmup"),
    [([], 50), (["--steps", "20"], 2), (["--steps", "20", "--optim.warmup-steps", "3"], 3)],
)
def test_a_short_run_warms_up_shortly(more: list[str], warmup: int) -> None:
    """The default warm-up must not outlast a short run, and what the user says stands."""
    assert cli.train_config(["--out", "somewhere", *more])[0].optim.warmup_steps == warmup
