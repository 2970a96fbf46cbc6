"""What each command can be told: a dataclass a command, its texts are the help. Used by `cli.py` alone, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from clearhead.data.config import DataConfig
from clearhead.models.config import ModelConfig
from clearhead.objectives.config import ObjectiveConfig
from clearhead.train.config import OptimConfig, TrainConfig
from clearhead.train.finetune import CONTEXT as FINETUNE_CONTEXT
from clearhead.train.finetune import STEPS as FINETUNE_STEPS

DEFAULT_STEPS = 1000
TRANSLATION_DATA: dict[str, Any] = {"source": "verses-en-de", "tokenizer": "bpe", "vocab_size": 4096}
TRANSLATION_TRAIN: dict[str, Any] = {"batch_size": 64, "label_smoothing": 0.1}
"""Where the options of a translation begin, so that the shortest command trains something that makes sense."""


@dataclass(frozen=True)
class Compare:
    """Train several models that differ in one declared thing, and say whether it helped.

    Every arm gets the same text, the same order of batches, the same budget and the same seeds. The folder holds
    report.html (one file, works offline), results.json, results.csv and each run. Stopped, the same command goes on.
    """

    attention: Annotated[
        tuple[str, ...], arg(metavar="SPEC ...", help_behavior_hint="(default: the preset's four)")
    ] = ()
    """Attention specs, an arm each; the first is the baseline. A spec joins softmax, self_adjust or performer,
    laser, window:N or bigbird, selective or learned by +, such as softmax+selective."""
    arm: Annotated[tuple[str, ...], arg(metavar="ARM ...", help_behavior_hint="(default: none)")] = ()
    """Arms of any kind: "name: key=value key=value", such as "gated: model.output_gate=head"."""
    baseline: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: the first)")] = None
    """The arm that the others are measured against."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: small ones from nothing)")] = None
    """Fine-tune this pretrained model in each arm: smollm2 (`clearhead data fetch smollm2`), or a Hugging Face folder.
    The arms are then softmax, softmax+selective and softmax+learned, with three seeds, unless told otherwise."""
    preset: str = "default"
    """quick (about 2 minutes) | default (about 10) | thorough (a grid of learning rates for each arm)."""
    data: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: shakespeare)")] = None
    """A name from `clearhead data list`, your own file or folder, or a generated task such as synthetic:recall."""
    seeds: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the preset's)")] = None
    """Runs of each arm; at least 2, and 5 for a useful interval."""
    context: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the preset's)")] = None
    """Tokens in a training window, and the longest context in evaluation. A run keeps its tokens: the batch becomes
    smaller, then the steps fewer, unless --steps or --set say otherwise."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the preset's)")] = None
    """Training steps of each run."""
    budget: Annotated[
        Literal["tokens", "flops", "time"] | None,
        arg(metavar="{tokens,flops,time}", help_behavior_hint="(default: tokens)"),
    ] = None
    """What is equal between the arms."""
    budget_minutes: Annotated[float | None, arg(metavar="MINUTES", help_behavior_hint="(default: no limit)")] = None
    """Choose steps, and seeds unless --seeds says them, so that all of it ends in so many minutes on this machine; what
    it will be able to see is said before it starts."""
    learning_rates: Annotated[
        tuple[float, ...], arg(metavar="LR ...", help_behavior_hint="(default: one declared rate for all)")
    ] = ()
    """A grid from which each arm's learning rate is chosen by validation."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help_behavior_hint="(default: none)")] = ()
    """Changes to the base of every arm: key=value, such as model.layers=6 optim.lr=1e-3."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: one for each core)")] = None
    """Runs at a time."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: compare-PRESET)")] = None
    """The folder. Without --out a comparison that differs from its preset gets a short hash in the name."""
    redraw: Annotated[Path | None, arg(name="from", metavar="PATH", help_behavior_hint="")] = None
    """Write the report of the comparison in this folder anew from its runs, and train nothing."""

    EXAMPLES = """
    clearhead compare
    clearhead compare --preset quick --data my.txt
    clearhead compare --budget-minutes 5 --attention softmax laser
    clearhead compare --attention softmax laser laser+selective --seeds 8 --out compare-laser
    clearhead compare --attention softmax window:256 bigbird performer --context 4096
    clearhead compare --attention softmax window:16 --data synthetic:recall --context 128
    clearhead compare --arm "base:" "gated: model.output_gate=head" --set model.width=192 model.heads=6
    clearhead compare --model smollm2
    clearhead compare --model ./my-model --data my.txt --attention softmax laser --steps 200 --set train.precision=bf16
    clearhead compare --from compare-default
    """


@dataclass(frozen=True)
class Train:
    """Train one model in a folder of its own. Stopped or killed, the same command goes on from the last checkpoint.

    The folder gets config.json (everything that decides the run), tokenizer.json, metrics.jsonl, checkpoint/ and
    result.json. Every field of the configuration is an option below.
    """

    out: Path
    """The run's folder: a new one, or the one of this very run."""
    size: Annotated[str, arg(name="model", help_behavior_hint="(default: small)")] = "small"
    """The named size that --model.* begin from: tiny | small | base | large."""
    task: Literal["causal_lm", "masked_lm", "translation"] = "causal_lm"
    """causal_lm: a decoder predicts the next token | masked_lm: an encoder fills in hidden tokens | translation: an
    encoder-decoder translates sentence pairs."""
    recipe: Annotated[str, arg(name="objective", help_behavior_hint="(default: plain)")] = "plain"
    """The named objective that --objective.* begin from: plain (the task's own) | bmi (next-segment prediction beside
    it) | bmi-full (and the weighted likelihood of later segments, from the run --objective.start)."""
    source: Annotated[
        str | None,
        arg(name="data", metavar="STR", help_behavior_hint="(default: shakespeare; of a translation verses-en-de)"),
    ] = None
    """A name from `clearhead data list`, or your own file or folder (.txt, .jsonl, either as .gz). A translation reads
    pairs: a name such as verses-en-de, or a .tsv (source, tab, target) or a .jsonl (keys source, target).
    synthetic:NAME,option=value draws a task instead of reading text (docs/long-data.md)."""
    context: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the size's own)")] = None
    """Tokens in one training window."""
    memory: Annotated[str | None, arg(metavar="LAYOUT", help_behavior_hint="(default: none)")] = None
    """causal_lm only: what each layer remembers beyond the window, such as full:512, last:1 or
    interleaved:2,long=512,short=64. Every row of a batch then reads on where it stopped. A named size gets positions
    xl with it, unless --model.position says otherwise."""
    segment: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the context)")] = None
    """Another word for --context, usual with --memory."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint=f"(default: {DEFAULT_STEPS})")] = None
    """The budget: optimizer steps."""
    tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by --steps)")] = None
    """The budget in tokens, instead of --steps."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    EXAMPLES = """
    clearhead train --out runs/first --model tiny --steps 300
    clearhead train --out runs/laser --data my.txt --model.attention laser --optim.lr 1e-3
    clearhead train --out runs/masked --task masked_lm --model tiny --model.position t5
    clearhead train --out runs/en-de --task translation --model tiny --context 96 --steps 3000
    clearhead train --out runs/mine --task translation --data pairs.tsv --data.tokenizer bytes --train.beams 4
    clearhead train --out runs/memory --memory last:1,long=512,short=64 --segment 128
    clearhead train --out runs/bmi --objective bmi --objective.segments sentence:64
    clearhead train --out runs/full --objective bmi-full --objective.start runs/bmi --objective.segments sentence:64
    clearhead train --out runs/bpe --data.tokenizer bpe --data.vocab-size 4096 --context 512
    torchrun --nproc-per-node 2 -m clearhead.cli train --out runs/two --train.parallel ddp
    """


@dataclass(frozen=True)
class Finetune:
    """Train a pretrained causal language model further, with another attention if you like, in a folder of its own.

    The model is a Hugging Face folder. What learns: LoRA beside its matrices, the temperatures of the attention alone,
    or everything. Before the first step the model is scored as it is. Stopped or killed, the same command goes on.
    """

    model: str
    """smollm2 (after `clearhead data fetch smollm2`), or a folder that `save_pretrained` wrote."""
    attention: str = "softmax+selective"
    """An attention spec. Temperatures (selective, learned) begin as the identity; laser, self_adjust, a window and so
    on change the model at once, and training brings it back or does not."""
    data: str = "shakespeare"
    """A name from `clearhead data list`, or your own file or folder (.txt, .jsonl, either as .gz)."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: finetune-MODEL-ATTENTION)")] = None
    """The run's folder: a new one, or the one of this very run."""
    tune: Literal["lora", "temperature", "full"] = "lora"
    """lora: small matrices beside the model's own (needs peft) | temperature: nothing but temperatures | full: every
    parameter. Temperatures that the attention names learn in each."""
    steps: int = FINETUNE_STEPS
    """Optimizer steps."""
    context: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint=f"(default: {FINETUNE_CONTEXT}, or the model's positions)")
    ] = None
    """Tokens in one training window."""
    batch: int = 1
    """Windows in one step."""
    lr: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: by --tune)")] = None
    """Peak learning rate: 5e-4 for lora, 5e-3 for temperature, 2e-5 for full."""
    temperature_lr: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: 5e-3)")] = None
    """Peak learning rate of the temperatures."""
    seed: int = 0
    """Decides LoRA's start, the order of the data and the dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: products in bf16 (autocast), two to four times as fast where the machine has bf16; scores are fp32."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward pass: less memory, about a third more time."""
    lora_rank: int = 8
    """Inner size of LoRA's matrices."""
    lora_targets: str = "default"
    """default (what peft takes for this kind of model) | all-linear | names joined by commas."""
    device: str = "auto"
    """auto (a GPU when there is one) | cpu | cuda | cuda:1 | mps."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help_behavior_hint="(default: none)")] = ()
    """Anything else of the run's configuration, such as optim.warmup_steps=20 train.test_tokens=none."""
    export: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Write the finished model to this new folder, LoRA merged, for `clearhead.hf.load` and from_pretrained."""

    EXAMPLES = """
    clearhead data fetch smollm2
    clearhead finetune --model smollm2 --attention softmax+selective --data shakespeare
    clearhead finetune --model smollm2 --attention laser --precision bf16 --steps 100
    clearhead finetune --model ./my-model --tune temperature --data my.txt --export ./my-model-selective
    clearhead finetune --model smollm2 --tune full --batch 4 --steps 2000 --precision bf16 --gradient-checkpointing
    """


@dataclass(frozen=True)
class Evaluate:
    """Score a trained run, by its task.

    causal_lm: bits per byte and perplexity of every document; documents longer than the context are read through
    overlapping windows, and each byte of text is scored once. masked_lm: nats and accuracy on hidden tokens, always the
    same ones. translation: nats per token, chrF and BLEU (by sacrebleu), and some translations to look at. A generated
    task: bits per answer and accuracy, by how far back the answer stands.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder, as `clearhead train` made it."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which part of the text; all = every document, for text that the run was not trained on."""
    data: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: the run's own)")] = None
    """Other text: a name from `clearhead data list`, or a file or folder; read with the run's tokenizer."""
    context: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the run's)")] = None
    """Tokens that a prediction can look back on at most."""
    lengths: Annotated[tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="(default: none)")] = ()
    """causal_lm only: score the same tokens with each of these contexts, up to beyond the run's own; documents shorter
    than the longest are left out."""
    memory: Annotated[str | None, arg(metavar="LAYOUT", help_behavior_hint="(default: the run's)")] = None
    """Another memory than in training, such as full:2048: documents are read segment by segment."""
    stride: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: half the context)")] = None
    """Tokens that each further window scores; smaller is slower and gives more context. With --lengths: half of the
    shortest."""
    tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Score about so many tokens, spread evenly over the documents."""
    beams: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the run's)")] = None
    """translation only: width of the search; 1 = greedy."""
    segments: Annotated[str | None, arg(metavar="CUT", help_behavior_hint="(default: the run's objective)")] = None
    """Not for a translation. Also estimate what neighbouring segments tell about each other by the model's states, cut
    as chunk:N or sentence:N; and how well the run's own critic tells neighbours, if it has one."""
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: none)")] = ()
    """causal_lm only: ask the questions of these tasks of lm-eval instead of scoring text (docs/lm-eval.md)."""
    tasks_folder: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: lm-eval's own)")] = None
    """With --tasks: a folder of task files of your own (.yaml), which come first."""
    limit: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """With --tasks: questions per task at most, for a trial."""
    shots: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the task's own)")] = None
    """With --tasks: worked examples before each question."""
    device: str = "auto"
    """auto (a GPU when there is one) | cpu | cuda | mps."""
    json: bool = False
    """Print JSON instead of a table."""

    EXAMPLES = """
    clearhead evaluate runs/first
    clearhead evaluate runs/first --split val --json
    clearhead evaluate runs/first --data moby.txt --split all
    clearhead evaluate runs/first --lengths 256 512 1024 2048
    clearhead evaluate runs/memory --memory full:2048
    clearhead evaluate runs/en-de --beams 4
    clearhead evaluate runs/first --segments sentence:64
    clearhead evaluate runs/first --tasks my_task --tasks-folder tasks
    """


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained run; or, by its task, fill in hidden tokens, or translate.

    causal_lm: the prompt stands at the beginning of a document, and the continuation ends where the model says that the
    document ends. The same seed gives the same text on the same machine. masked_lm: each [MASK] in the prompt becomes
    the likeliest token. translation: the prompt is translated by beam search.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder, as `clearhead train` made it."""
    prompt: str = ""
    """The text to continue (empty = begin a new document), to complete or to translate."""
    tokens: int = 400
    """New tokens at most (bytes, with the byte tokenizer)."""
    temperature: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: 1)")] = None
    """Below 1 is more predictable, above 1 wilder, 0 always takes the likeliest token."""
    top_k: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: no limit)")] = None
    """Draw among the k likeliest tokens only."""
    top_p: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: no limit)")] = None
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of the draw."""
    beams: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """translation only: width of the search; 1 = greedy."""
    device: str = "auto"
    """auto (a GPU when there is one) | cpu | cuda | mps."""

    EXAMPLES = """
    clearhead generate runs/first --prompt "To be, or not"
    clearhead generate runs/first --prompt "ROMEO." --temperature 0.8 --top-p 0.95 --tokens 1000
    clearhead generate runs/masked --prompt "To be, or n[MASK]t to be"
    clearhead generate runs/en-de --prompt "In the beginning God created the heavens and the earth."
    """


@dataclass(frozen=True)
class Inspect:
    """Find out where a model loses its signal: theory beside measurement, layer by layer, and what repairs it.

    Prints a table, findings and advice, and writes report.html (one file, works offline) and inspect.json. The theory
    needs no data and takes a second for 1,000 layers; the measurement is one forward and backward pass over a few
    sequences. Advice is tried on the theory before it is given, and comes with the command that tests it in training.
    """

    model: str
    """A named size (tiny | small | base | large | deep-post-ln), a run's folder, a saved model's, a config file
    (.json), a Hugging Face folder, or a .gguf file."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help_behavior_hint="(default: none)")] = ()
    """Changes to a named size or a config file: layers=96 norm_placement=post init=xavier."""
    data: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: the run's own, or shakespeare)")] = (
        None
    )
    """Text to measure on: a name from `clearhead data list`, or your own file or folder."""
    context: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the model's, at most 128 for others)")
    ] = None
    """Tokens in a sequence."""
    batch: int = 4
    """Sequences that are measured."""
    theory: bool = False
    """Predict only: no data, no pass through the model."""
    eval: bool = False
    """Measure without dropout."""
    seed: int = 0
    """Of the weights of a named size, and of everything that is drawn."""
    apply: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: write none)")] = None
    """Write the config with the first advice applied to this new file, for `clearhead train --model PATH`."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: inspect-MODEL)")] = None
    """Folder of the report."""
    json: bool = False
    """Print JSON instead of the table."""
    device: str = "auto"
    """auto (a GPU when there is one) | cpu | cuda | mps."""

    EXAMPLES = """
    clearhead inspect --model deep-post-ln
    clearhead inspect --model deep-post-ln --apply repaired.json
    clearhead inspect --model small --set layers=1000 width=64 norm_placement=pre init=deepscale --theory
    clearhead inspect --model runs/first
    clearhead inspect --model ./my-hugging-face-model --data my.txt
    """


@dataclass(frozen=True)
class Explain:
    """Say which backend would compute an attention on tensors of a given shape, and why the others would not."""

    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """The attention: softmax, self_adjust:form=product, laser, laser+selective+window:256, ..."""
    length: int = 1024
    """Queries, and keys."""
    heads: int = 8
    """Query heads."""
    kv_heads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as many as query heads)")] = None
    """Key and value heads (grouped queries)."""
    head_dim: int = 64
    """Size of one head."""
    batch: int = 2
    """Sequences at a time."""
    causal: bool = True
    """Whether a query sees earlier keys only."""
    padding: bool = False
    """Whether the sequences have different lengths."""
    dropout: float = 0.0
    """Dropout on the attention weights."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the tensors."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    memory: Annotated[str | None, arg(metavar="LAYOUT", help_behavior_hint="(default: none)")] = None
    """Tell what a decoder's memory, such as last:1,long=512,short=64, holds in each layer, and what reads it."""
    layers: int = 6
    """With --memory: layers of the decoder. Its width is heads times head size."""
    segment: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the length)")] = None
    """With --memory: tokens read at a time."""
    position: str = "xl"
    """With --memory: how positions are told: xl, rope, alibi, t5, kerple, fire or none."""

    EXAMPLES = """
    clearhead explain softmax
    clearhead explain softmax --memory last:1,long=512,short=64 --layers 6 --segment 128
    clearhead explain laser+window:256 --length 4096 --padding
    clearhead explain self_adjust --heads 8 --kv-heads 2 --dtype bfloat16
    """
