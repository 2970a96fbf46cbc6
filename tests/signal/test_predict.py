"""The prediction of whole stacks: order of the computation, conservation laws, limits, and speed of growth."""

import dataclasses
import math

import pytest
import torch

from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.describe import describe
from clearhead.signal.inspection import predict
from clearhead.signal.measurement import measure
from clearhead.signal.moments.types import GradientMoments
from clearhead.signal.prediction import predict_skeleton
from clearhead.signal.trace import Trace


def shape(**changes: object) -> ModelConfig:
    base = ModelConfig(
        architecture="encoder",
        vocab_size=500,
        context=32,
        layers=6,
        width=96,
        heads=4,
        feed_forward="relu",
        norm="layer",
        norm_placement="pre",
        init="xavier",
        position="learned",
        dropout=0.1,
    )
    return dataclasses.replace(base, **changes)


def zipf_batch(config: ModelConfig, seed: int, rows: int = 4) -> torch.Tensor:
    p = 1.0 / torch.arange(1, config.vocab_size + 1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    return torch.multinomial(p / p.sum(), rows * config.context, True, generator=draw).reshape(rows, -1)


def measured_and_predicted(config: ModelConfig, seed: int) -> tuple[Trace, Trace]:
    from clearhead.init.embedding_correlation import batch_repetition

    torch.set_num_threads(1)
    model = build_model(config, seed)
    batch = zipf_batch(config, seed)
    noise = torch.Generator().manual_seed(1000 + seed)
    found = measure(model, batch, loss=lambda out, _: (out * torch.randn(out.shape, generator=noise)).sum(), seed=seed)
    gradient = found[f"{config.architecture}.output"].backward
    skeleton = describe(config, tokens=config.context, repetition=batch_repetition(batch.numpy()))
    return found, predict_skeleton(skeleton, output_gradient=gradient, sequences=4)


def mean_log_ratio(pairs: list[tuple[Trace, Trace]], place: str, quantity: str) -> dict[str, float]:
    """By tap, log of the geometric mean over seeds of measured / predicted."""
    answer = {}
    for tap in pairs[0][1].at(place):
        logs = []
        for found, said in pairs:
            a = getattr(found[tap.name], quantity).variance
            b = getattr(said[tap.name], quantity).variance
            logs.append(math.log(a / b))
        answer[tap.name] = sum(logs) / len(logs)
    return answer


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("init", ["xavier", "deepscale"])
def test_prediction_meets_the_measurement(architecture: str, placement: str, init: str) -> None:
    """Forward and backward variance of the stream at every sub-layer, mean of four seeds, a small model."""
    config = shape(architecture=architecture, norm_placement=placement, init=init)
    pairs = [measured_and_predicted(config, seed) for seed in range(4)]
    forward = mean_log_ratio(pairs, "input", "forward")
    backward = mean_log_ratio(pairs, "input", "backward")
    assert max(map(abs, forward.values())) < math.log(1.15), forward
    assert max(map(abs, backward.values())) < math.log(1.6), backward


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_other_units_and_norms(feed_forward: str, norm: str) -> None:
    config = shape(feed_forward=feed_forward, norm=norm, kv_heads=2, position="rope", architecture="decoder")
    pairs = [measured_and_predicted(config, seed) for seed in range(4)]
    assert max(map(abs, mean_log_ratio(pairs, "input", "forward").values())) < math.log(1.25)
    assert max(map(abs, mean_log_ratio(pairs, "input", "backward").values())) < math.log(1.6)


def test_matrix_gradients_meet_the_measurement() -> None:
    config = shape(layers=4)
    pairs = [measured_and_predicted(config, seed) for seed in range(4)]
    for tap in pairs[0][1].at("branch"):
        for name in tap.matrix_gradients:
            found = sum(a[tap.name].matrix_gradients[name] ** 2 for a, _ in pairs)
            said = sum(b[tap.name].matrix_gradients[name] ** 2 for _, b in pairs)
            assert found / said == pytest.approx(1.0, rel=0.8), (tap.name, name)


def test_deepscale_holds_variance_at_any_depth() -> None:
    for layers in (24, 192, 1000):
        trace = predict(shape(layers=layers, init="deepscale"), tokens=64)
        for tap in trace.stream("encoder"):
            assert tap.forward is not None
            assert 0.9 < tap.forward.variance < 1.1


def test_deepscale_gradient_does_not_depend_on_depth() -> None:
    factors = []
    for layers in (24, 192, 1000):
        stream = predict(shape(layers=layers, init="deepscale"), tokens=64).stream("encoder")
        factors.append(stream[1].backward.variance / stream[-1].backward.variance)
    assert max(factors) / min(factors) < 1.25


def test_pre_norm_grows_linearly_and_post_norm_stays() -> None:
    deep = predict(shape(layers=192)).stream("encoder")[-1].forward.variance
    shallow = predict(shape(layers=24)).stream("encoder")[-1].forward.variance
    assert 8.0 < deep / shallow < 9.0
    for tap in predict(shape(layers=192, norm_placement="post")).stream("encoder")[1:]:
        assert tap.forward.variance == pytest.approx(1.0, abs=2e-3)


def test_gradients_are_linear_in_the_output_gradient() -> None:
    skeleton = describe(shape(architecture="decoder"))
    one = predict_skeleton(skeleton, output_gradient=GradientMoments.of(1.0, 0.2))
    four = predict_skeleton(skeleton, output_gradient=GradientMoments.of(4.0, 0.2), sequences=9)
    for tap in one:
        if tap.backward is not None:
            assert four[tap.name].backward.variance == pytest.approx(4.0 * tap.backward.variance, rel=1e-9)
        for name, norm in tap.matrix_gradients.items():
            assert four[tap.name].matrix_gradients[name] == pytest.approx(6.0 * norm, rel=1e-9)


def test_evaluation_has_no_dropout() -> None:
    config = shape(dropout=0.5)
    train, still = predict(config), predict(config, training=False)
    assert train["encoder.output"].forward.variance > 1.15 * still["encoder.output"].forward.variance


def test_seq2seq_sends_gradient_to_the_encoder() -> None:
    trace = predict(shape(architecture="seq2seq", decoder_layers=3))
    names = {tap.stack for tap in trace}
    assert names == {"encoder", "decoder"}
    for tap in trace.at("input"):
        assert tap.backward is not None
        assert tap.backward.variance > 0.0
    assert any(tap.part == "cross_attention" for tap in trace)


def test_a_trained_scale_is_read_from_the_model() -> None:
    """A model's own weights count, not its config: doubling a matrix quadruples its branch."""
    config = shape(layers=2, dropout=0.0)
    model = build_model(config, 0)
    before = predict(model, tokens=32)["encoder.1.feed_forward.branch"].forward.variance
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight.mul_(2.0)
    after = predict(model, tokens=32)["encoder.1.feed_forward.branch"].forward.variance
    assert after == pytest.approx(4.0 * before, rel=1e-5)


def test_config_and_fresh_model_agree() -> None:
    for init in ("standard", "xavier", "small", "deepscale", "deepscale_simple", "admin_constant"):
        config = shape(init=init, norm_placement="post", width=128)
        by_config = predict(config, tokens=32)
        by_model = predict(build_model(config, 0), tokens=32)
        assert [tap.name for tap in by_config] == [tap.name for tap in by_model]
        for tap in by_config:
            if tap.forward is not None:
                assert by_model[tap.name].forward.variance == pytest.approx(tap.forward.variance, rel=0.1), tap.name


def test_admin_is_found_on_the_way() -> None:
    """omega_i^2 = 1 + the variances of the branches before it."""
    from clearhead.init.admin import profile_omega

    config = shape(init="admin", norm_placement="post", dropout=0.0, width=128)
    trace = predict(config, tokens=32)
    model = build_model(config, 0)
    profile_omega(model, zipf_batch(config, 0))
    profiled = predict(model, tokens=32)
    for tap in trace.at("branch"):
        assert profiled[tap.name].share == pytest.approx(tap.share, rel=0.35, abs=0.02)


def test_trace_survives_json() -> None:
    trace = predict(shape(layers=2))
    assert Trace.from_dict(trace.to_dict()) == trace


def test_a_thousand_layers_are_quick_to_describe() -> None:
    """No clock: the work is bounded by what is built, one layer of each stack twice, whatever the depth."""
    counted = []
    original = torch.nn.Linear.__init__

    def counting(self: torch.nn.Linear, *arguments: object, **named: object) -> None:
        counted.append(1)
        original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__init__", counting)
        describe(shape(layers=1000))
    assert len(counted) < 20


@pytest.mark.parametrize("position", ["none", "rope", "alibi", "t5", "kerple", "fire", "xl"])
def test_what_positions_add_to_scores_is_left_out_and_said_so(position):
    """The prediction is that of a model without them, and a note says it; rotary positions are predicted."""
    trace = predict(shape(position=position, architecture="decoder", layers=1))
    said = [note for note in trace.notes if "adds to the scores" in note]
    assert bool(said) == (position not in ("none", "rope"))
    if said:
        assert f"position={position}" in said[0]
