"""What the adopted encoders' numbers rest on: error counts, families that do not mix, a control that is uniform."""

import gzip
import wave

import pytest
import torch
from experiments.adopt_encoders import antibodies, report, sentences, speech, under

from clearhead.data import catalogue, models
from clearhead.errors import UserError
from tests.experiments import test_quick


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c", "a x c", 1),
        ("a b c", "b c", 1),
        ("a b c d", "b a c d e", 3),
    ],
)
def test_word_errors_count_edits(said, heard, errors):
    assert speech.word_errors(said.split(), heard.split()) == errors
    assert speech.word_errors(heard.split(), said.split()) == errors  # an edit has a way back


def test_words_are_compared_without_case_marks_and_numerals():
    assert speech.words("Mr. Dash-wood, press 10!") == ["mister", "dash", "wood", "press", "one", "zero"]
    assert speech.words("You've NO") == ["you've", "no"]


def write_sound(path, rate):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\x00\x40" * rate)


def test_clips_are_found_and_raised_to_16_khz(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path))
    place = tmp_path / "debian"
    for part, name in (("librivox", "transcription"), ("cards", "cards.transcription")):
        write_sound(place / speech._SPHINX / part / "x1.wav", 16_000)
        (place / speech._SPHINX / part / name).write_text("<s> ten of clubs  </s> (x1)\n")
    lines = ["; a head", "a: One two three four five.", "b/c: Six words are more than five.", "short: Two words."]
    lines += ["tone: [a tone of five long seconds]", "gone: This clip is in no file."]
    for name in ("a", "b/c", "short", "tone"):
        write_sound(place / speech._SOUNDS / f"{name}.wav", 8_000)
    (place / speech._TEXTS).parent.mkdir(parents=True)
    (place / speech._TEXTS).write_bytes(gzip.compress("\n".join(lines).encode()))
    if speech.root() != place:
        pytest.fail("the unpacked packages come before the system's own")
    found = speech.clips(2)
    assert [clip.text for clip in found[:2]] == ["ten of clubs"] * 2
    assert {clip.path.stem for clip in found[2:]} == {"a", "c"}
    for clip in found:
        samples = speech.sound(clip.path)
        assert len(samples) == 16_000
        assert samples[8_000] == pytest.approx(0.5, abs=0.01)


def test_genes_are_read_in_the_frame_without_stops():
    gene = "ATGCTAAAAGATAATCTAAAAGATAAT"
    assert antibodies.translate(gene) == "MLKDNLKDN"
    assert antibodies.translate(f"C{gene}TAGCC") == "MLKDNLKDN"  # one base late, and a stop after it
    assert antibodies.translate(f"CC{gene}") == "MLKDNLKDN"
    assert antibodies.translate(gene.replace("AAA", "ANA", 1)) == "MLXDNLKDN"


def test_what_is_trained_on_is_of_no_measured_family(monkeypatch):
    kin = {
        kind: [["".join(kind[0] + letter * 5), "".join(kind[0] + letter * 6)] for letter in "ACDEFG"]
        for kind in ("heavy", "light")
    }
    monkeypatch.setattr(antibodies, "families", lambda: kin)
    measured, trained = antibodies.held_out(2), antibodies.others(2)
    assert len(measured) == 4
    assert len(trained) == 2 * (6 - 2) * 2
    assert not {chain[:2] for chain in measured} & {chain[:2] for chain in trained}


def test_families_are_joined_by_shared_words():
    chains = ["ACDEFGHIKL", "ACDEFGHIKV", "WYWYWYWYWY", "DEFGHIKVMN"]
    assert antibodies.group(chains) == [["ACDEFGHIKL", "ACDEFGHIKV", "DEFGHIKVMN"], ["WYWYWYWYWY"]]


def test_the_control_weighs_every_key_the_same_and_leaves_the_model_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(5, 30, (2, 7))
    for layer in under.without_queries(model)(ids, output_attentions=True).attentions:
        assert torch.allclose(layer, torch.full_like(layer, 1 / 7))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no query projection"):
        under.without_queries(torch.nn.Linear(2, 2))


def test_rank_correlation_is_of_ranks():
    vectors = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1)
    assert sentences.rank_correlations(vectors, vectors, 4) == pytest.approx([1.0] * 4)
    other = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1)
    assert max(map(abs, sentences.rank_correlations(vectors, other, 4))) < 0.7


def test_a_rate_and_its_interval():
    clips = [{"errors": 1, "words": 4}, {"errors": 0, "words": 6}] * 10
    low, high = report.resampled(clips)
    assert low < report.error_rate(clips) == 0.1 < high
    assert report.resampled(clips, clips) == (0.0, 0.0)
    assert report.share(50, 100).startswith("0.500 (0.404 to 0.596)")


@pytest.mark.full
def test_the_quick_version_runs(tmp_path):
    try:
        for name in ("minilm", "antiberty", "whisper-tiny"):
            models.model_folder(name)
        for name in ("antibodies", "bible-kjv", "verses"):
            catalogue.path(name)
        speech.root()
    except UserError as error:
        pytest.skip(str(error))
    pytest.importorskip("transformers")
    test_quick.test_the_quick_version_runs("adopt_encoders", tmp_path)
