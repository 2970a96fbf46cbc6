"""experiments/deep_thin: equal parameters, the vision transformer's start, and honest choosing and judging."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.deep_thin import image_runs, images
from experiments.deep_thin.images import Split, patch_correlation, patches_of
from experiments.deep_thin.judge import choose, judge
from experiments.deep_thin.run import key_of_run, write
from experiments.deep_thin.settings import (
    CHOOSING_SEED,
    DEEP,
    DEEPSCALE,
    DEEPSCALE_POST,
    PAIRS,
    SETTINGS,
    SHALLOW,
    Arm,
    Setting,
    quick,
)
from experiments.deep_thin.speed import measure
from experiments.deep_thin.text_runs import language_plan, run_config
from experiments.deep_thin.vit import PatchEncoder, build, score

from clearhead.errors import UserError
from clearhead.models.make import build_model

PIXELS = {"digits": 4, "fashion": 49}


def model_of(setting: Setting, arm: Arm) -> Any:
    config = setting.config(arm)
    return PatchEncoder(config, PIXELS[setting.name]) if setting.name in PIXELS else build_model(config, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_arms_have_equal_parameters(name: str) -> None:
    setting = SETTINGS[name]
    totals = {arm.name: model_of(setting, arm).count_parameters()["total"] for arm in setting.arms}
    assert all(abs(total / totals["shallow"] - 1.0) < 0.02 for total in totals.values()), totals
    assert setting.deep.layers >= 4 * setting.shallow.layers


@pytest.mark.parametrize("name", SETTINGS)
def test_arms_differ_in_what_is_declared_and_nothing_else(name: str) -> None:
    setting = SETTINGS[name]
    declared = {"layers", "width", "heads", "hidden", "init", "norm_placement"}
    base = setting.config(SHALLOW).to_dict()
    for arm in setting.arms:
        config = setting.config(arm).to_dict()
        assert {key for key in config if config[key] != base[key]} <= declared
    assert set(setting.arms[1].words.split(", ")) - set(DEEPSCALE.words.split(", ")) == {"Xavier"}
    deep, scaled = setting.config(DEEP).to_dict(), setting.config(DEEPSCALE).to_dict()
    assert {key for key in deep if deep[key] != scaled[key]} == {"init"}


def test_the_plan_of_the_language_comparison_is_the_setting() -> None:
    setting = SETTINGS["language"]
    plan = language_plan(setting)
    for arm in setting.arms:
        assert plan.arm(arm.name).apply(plan.base).model == setting.config(arm)
    assert (plan.learning_rates, len(plan.seeds), plan.baseline) == (setting.rates, setting.seeds, "shallow")
    assert CHOOSING_SEED not in plan.seeds


def test_a_run_that_chooses_scores_next_to_nothing_of_the_test_split() -> None:
    setting = SETTINGS["translation"]
    choosing = run_config(setting, SHALLOW, 1e-3, CHOOSING_SEED, judged=False)
    assert choosing.train.test_tokens == 1
    assert run_config(setting, SHALLOW, 1e-3, 0, judged=True).train.test_tokens == setting.test


def test_patches_are_tiles_row_by_row() -> None:
    picture = torch.arange(64.0).reshape(1, 8, 8)
    tiles = patches_of(picture, 2)
    assert tiles.shape == (1, 16, 4)
    assert tiles[0, 0].tolist() == [0.0, 1.0, 8.0, 9.0]
    assert tiles[0, 5].tolist() == [18.0, 19.0, 26.0, 27.0]  # second row, second column of tiles
    assert sorted(tiles.flatten().tolist()) == list(range(64))


def test_patch_correlation_is_that_of_random_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 1, 9, generator=generator)
    patches = 0.6 * shared + 0.8 * torch.randn(200, 6, 9, generator=generator) + 0.3
    tokens = patches @ torch.randn(9, 4000, generator=generator)
    own = tokens.square().mean()
    across = torch.stack([(tokens[:, i] * tokens[:, j]).mean() for i in range(6) for j in range(6) if i != j]).mean()
    assert patch_correlation(patches) == pytest.approx(float(across / own), abs=0.02)
    assert patch_correlation(patches) > 0.3
    alternating = torch.tensor([1.0, -1.0]).repeat(3)[None, :, None].expand(5, 6, 4)
    assert patch_correlation(alternating) == 0.0  # never below: the scheme has no use for a negative one


@pytest.mark.parametrize("arm", [DEEPSCALE, DEEPSCALE_POST])
def test_deepscale_keeps_the_stream_of_patches_at_variance_one(arm: Arm) -> None:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(64, 16, 4, generator=generator)
    wider = dataclasses.replace(SETTINGS["digits"].deep, width=96, hidden=384)
    setting = dataclasses.replace(SETTINGS["digits"], deep=wider)
    model = build(setting.config(arm), patches, seed=0)
    torch.manual_seed(0)
    variances: list[float] = []
    hooks = [
        block.register_forward_hook(lambda *x: variances.append(float(x[2].detach().var()))) for block in model.blocks
    ]
    model(patches)
    for hook in hooks:
        hook.remove()
    assert len(variances) == setting.deep.layers
    assert min(variances) > 0.75, variances
    assert max(variances) < 1.3, variances


def test_the_vision_transformer_reads_every_patch_and_its_place() -> None:
    patches = torch.randn(3, 16, 4)
    model = build(SETTINGS["digits"].config(DEEP), patches, seed=0).eval()
    plain = model(patches)
    assert plain.shape == (3, 10)
    assert not torch.allclose(model(patches.flip(1)), plain, atol=1e-4)
    for place in (0, 7, 15):
        edited = patches.clone()
        edited[:, place] += 1.0
        assert not torch.allclose(model(edited), plain, atol=1e-5)
    assert torch.equal(build(SETTINGS["digits"].config(DEEP), patches, seed=0).eval()(patches), plain)


def two_classes(images_: int, seed: int) -> Split:
    """Class 1 has its first patch brighter."""
    generator = torch.Generator().manual_seed(seed)
    patches, classes = torch.randn(images_, 16, 4, generator=generator), torch.arange(images_) % 2
    patches[:, 0] += 3.0 * classes[:, None]
    return Split(patches, classes)


@pytest.mark.parametrize("arm", [SHALLOW, DEEPSCALE])
def test_a_run_learns_and_repeats(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": two_classes(256, 0), "val": two_classes(100, 1), "test": two_classes(200, 2)}
    monkeypatch.setattr(image_runs, "_loaded", {"digits": data})
    setting = dataclasses.replace(quick(SETTINGS["digits"]), steps=60, batch=32, test=200)
    row = image_runs.train_images(setting, arm, 3e-3, 0, judged=True)
    assert row["status"] == "finished"
    assert row["test"] < 15.0
    again = image_runs.train_images(setting, arm, 3e-3, 0, judged=False)
    assert again["val_nats"] == row["val_nats"]
    assert "test" not in again


def test_a_run_that_leaves_the_finite_numbers_is_reported() -> None:
    broken = Split(torch.full((64, 16, 4), torch.nan), torch.zeros(64, dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_runs, "_loaded", {"digits": dict.fromkeys(("train", "val", "test"), broken)})
        row = image_runs.train_images(quick(SETTINGS["digits"]), SHALLOW, 1e-3, 0, judged=True)
    assert row["status"] == "diverged"
    assert "test" not in row


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch() -> None:
    epoch = np.concatenate([image_runs.rows_at(100, 16, 3, step) for step in range(6)])
    assert len(set(epoch.tolist())) == 96
    assert np.array_equal(image_runs.rows_at(100, 16, 3, 2), epoch[32:48])
    assert not np.array_equal(image_runs.rows_at(100, 16, 3, 8), epoch[32:48])
    assert not np.array_equal(image_runs.rows_at(100, 16, 4, 2), epoch[32:48])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_speed_of_every_arm_is_measured(name: str) -> None:
    setting = quick(SETTINGS[name])
    speed = measure(setting, rounds=1)
    assert set(speed) == {arm.name for arm in setting.arms}
    assert speed["shallow"]["ratio"] == 1.0
    assert all(arm["median_seconds"] > 0 for arm in speed.values())


def test_score_counts_wrong_classes() -> None:
    class Table(torch.nn.Module):
        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return patches[:, 0]

    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])[:, None]
    wrong, nats = score(Table(), logits, torch.tensor([0, 1, 1, 0]), batch=3)
    assert wrong == 25.0
    assert nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor([0, 1, 1, 0]))))


def test_missing_data_are_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "FASHION", tmp_path)
    with pytest.raises(UserError, match=r"apt-get install .*dataset-fashion-mnist") as caught:
        images.load("fashion")
    assert "\n" not in str(caught.value)


def test_fashion_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = {"train": 10_020, "t10k": 30}
    for part, count in pictures.items():
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(bytes(16) + generator.integers(0, 256, count * 784, dtype=np.uint8).tobytes())
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + (np.arange(count) % 10).astype(np.uint8).tobytes())
    monkeypatch.setattr(images, "FASHION", tmp_path)
    data = images.load("fashion")
    assert {name: tuple(split.patches.shape) for name, split in data.items()} == {
        "train": (20, 16, 49), "val": (10_000, 16, 49), "test": (30, 16, 49)
    }  # fmt: skip
    assert abs(float(data["train"].patches.mean())) < 1e-5
    assert float(data["train"].patches.std()) == pytest.approx(1.0, abs=1e-3)
    assert data["test"].classes.tolist() == [i % 10 for i in range(30)]


def test_digits_are_split_once_and_fully() -> None:
    pytest.importorskip("sklearn")
    data = images.load("digits")
    assert {name: len(split.classes) for name, split in data.items()} == {"train": 1077, "val": 300, "test": 420}
    rows = torch.cat([split.patches.flatten(1) for split in data.values()])
    assert len(torch.unique(rows, dim=0)) == 1797  # no picture stands in two splits


SPEED = {arm.name: {"median_seconds": 0.02, "ratio": 1.0} for arm in (SHALLOW, DEEP, DEEPSCALE, DEEPSCALE_POST)}


def runs_of(setting: Setting, tests: dict[str, list[float]], **changes: Any) -> list[dict[str, Any]]:
    """Runs whose validation likes the second rate."""
    runs = []
    for arm in setting.arms:
        common = {
            "task": setting.name, "arm": arm.name, "steps": setting.steps, "status": "finished", "parameters": 1000,
            "outside_embedding": 900, "step_ms": 20.0, "seconds": 1.0,
        }  # fmt: skip
        for index, rate in enumerate(setting.rates):
            runs.append(
                {**common, "rate": rate, "seed": CHOOSING_SEED, "val": 1.0 + abs(index - 1), "test": 9.0 - index}
            )
        for seed, value in enumerate(tests[arm.name]):
            runs.append({**common, "rate": setting.rates[1], "seed": seed, "val": 1.0, "test": value} | changes)
    return runs


def test_validation_alone_chooses_the_rate() -> None:
    setting = SETTINGS["language"]
    tests = {arm.name: [1.0] * 5 for arm in setting.arms}
    runs = runs_of(setting, tests)
    assert choose(setting, DEEP, runs) == setting.rates[1]
    assert choose(setting, DEEP, [{**run, "test": -run["test"]} for run in runs]) == setting.rates[1]
    assert choose(setting, DEEP, [{**run, "val": None} for run in runs]) == min(setting.rates)
    tied = [{**run, "val": 1.0, "val_nats": 1.0 / run["rate"]} for run in runs]
    assert choose(setting, DEEP, tied) == max(setting.rates)


def test_verdicts_follow_the_paired_differences() -> None:
    setting = SETTINGS["language"]
    noise = [0.3, -0.2, 0.1, 0.0, 0.25]  # the seed's own luck, which the pairing removes
    small, other = [0.01, -0.01, 0.0, 0.02, -0.02], [0.02, 0.0, -0.02, 0.01, -0.01]
    tests = {
        "shallow": [2.0 + n for n in noise],
        "deep": [2.2 + n + s for n, s in zip(noise, small)],
        "deepscale": [2.0 + n + s for n, s in zip(noise, other)],
    }
    result = judge(setting, runs_of(setting, tests), SPEED)
    assert result is not None
    verdicts = {(pair["candidate"], pair["against"]): pair["verdict"] for pair in result["pairs"]}
    assert verdicts[DEEPSCALE.words, SHALLOW.words].startswith("no difference shown")
    assert verdicts[DEEP.words, SHALLOW.words] == "worse"
    assert verdicts[DEEPSCALE.words, DEEP.words] == "better"
    pair = next(pair for pair in result["pairs"] if pair["candidate"] == DEEP.words)
    assert pair["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert pair["mean"] == pytest.approx(0.2)


def test_an_arm_with_a_diverged_run_is_never_better() -> None:
    setting = SETTINGS["language"]
    tests = {"shallow": [2.0, 2.1, 2.2, 2.0, 2.1], "deep": [2.0] * 5, "deepscale": [1.0, 1.1, 1.21, 1.0, 1.1]}
    runs = runs_of(setting, tests)
    last = next(run for run in runs if (run["arm"], run["seed"]) == ("deepscale", 4))
    last |= {"status": "diverged", "test": None}
    result = judge(setting, runs, SPEED)
    assert result is not None
    assert result["pairs"][0]["verdict"] == "not judged"
    assert next(arm for arm in result["arms"] if arm["name"] == "deepscale")["diverged"] == 1


def test_the_report_is_written_from_the_runs_alone(tmp_path: Path) -> None:
    setting = SETTINGS["digits"]
    tests = {arm.name: [3.0 + index + 0.1 * seed**2 for seed in range(5)] for index, arm in enumerate(setting.arms)}
    runs = runs_of(setting, tests, test_nats=0.123)
    assert len({key_of_run(run) for run in runs}) == len(runs)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (tmp_path / "speed.json").write_text(json.dumps({"digits": SPEED}))
    write(tmp_path, quick_run=False, into_readme=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [task["name"] for task in results["tasks"]] == ["digits"]  # of the other tasks no run is there
    assert len(results["tasks"][0]["pairs"]) == len(PAIRS)
    assert "deep-thin DeepScaleLM against shallow-wide Xavier" in (tmp_path / "differences.svg").read_text()
