import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.data.catalogue import CATALOGUE
from clearhead.data.config import DataConfig
from clearhead.data.sequences import READERS, reverse_complement, shared_share
from clearhead.data.sources import resolve
from clearhead.data.text import prepare
from clearhead.errors import UserError

EMBL = b"""ID   X1; SV 1; linear; mRNA; STD; HUM; 14 BP.
DE   SQ is not a line of its own here
SQ   Sequence 14 BP; 3 A;
     acgturyacg acgt                                                          14
//
ID   AF129756; SV 1; linear;
SQ   Sequence 4 BP;
     aaaa                                                                      4
//
"""
SWISS = b"""ID   CRU4_ARATH              Reviewed;         12 AA.
SQ   SEQUENCE   12 AA;  1 MW;  0 CRC64;
     MARVSSLLSF CL
//
"""


def test_flat_files():
    assert list(READERS["flat-dna"](EMBL, "x")) == [("X1", b"ACGTTNNACGACGT"), ("AF129756", b"AAAA")]
    assert list(READERS["flat"](SWISS, "x")) == [("CRU4_ARATH", b"MARVSSLLSFCL")]
    with pytest.raises(UserError, match="ends within the sequence"):
        list(READERS["flat"](SWISS[:-3], "x"))
    with pytest.raises(UserError, match="a sequence comes before its ID"):
        list(READERS["flat"](SWISS.split(b"\n", 1)[1], "x"))


def test_fasta():
    data = b">one what it is\r\nACGT\r\nrrn\r\n>two\nA\n\n"
    assert list(READERS["fasta-dna"](data, "x")) == [("one", b"ACGTNNN"), ("two", b"A")]
    assert list(READERS["fasta"](b">p\nMKR*\n", "x")) == [("p", b"MKR")]
    with pytest.raises(UserError, match="does not begin with '>'"):
        list(READERS["fasta"](b"ACGT\n", "x"))
    with pytest.raises(UserError, match="x, a: expected bases, got '-'; an alignment"):
        list(READERS["fasta-dna"](b">a\nAC-GT\n", "x"))


@given(st.lists(st.text(alphabet="ACGTN", min_size=1, max_size=30), min_size=1, max_size=4), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_fasta_of_any_line_width(records, width):
    lines = (f">r{i}\n" + "\n".join(r[j : j + width] for j in range(0, len(r), width)) for i, r in enumerate(records))
    found = list(READERS["fasta-dna"]("\n".join(lines).encode(), "x"))
    assert found == [(f"r{i}", r.encode()) for i, r in enumerate(records)]


def test_a_users_sequence_files(tmp_path):
    (tmp_path / "a.fna").write_text(">x\nacgu\n")
    (tmp_path / "b.FA.gz").write_bytes(gzip.compress(b">y\nMKRU\n"))
    found = {d.name: d.data for d in resolve(str(tmp_path)).documents()}
    assert found == {"x": b"ACGT", "y": b"MKRU"}
    assert [d.data for d in resolve(str(tmp_path / "a.fna")).documents()] == [b"ACGT"]


def install(data_folder, name, data):
    """Put a Debian set's file where `dpkg -x` would."""
    path = data_folder / "debian" / CATALOGUE[name].take[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_debian_sets_are_read_where_they_lie(data_folder):
    with pytest.raises(UserError, match="apt-get download bowtie-examples"):
        resolve("ecoli")
    install(data_folder, "human-dna", EMBL)
    found = list(resolve("human-dna").documents())
    assert [d.name for d in found] == ["X1"]  # AF129756 lies inside another entry of the real file


def test_one_genome_is_split_into_stretches_that_are_said(data_folder):
    import random

    genome = "".join(random.Random(0).choices("ACGT", k=60_000))
    install(data_folder, "ecoli", f">gi|1| E. coli\n{genome}\n".encode())
    data = prepare(DataConfig(source="ecoli", tokenizer="dna", context=64))
    parts = {split: data.documents(split)[0] for split in ("train", "val", "test")}
    texts = {split: data.tokenizer.decode(part.tokens[1:]) for split, part in parts.items()}
    ends = {split: (genome.find(text), genome.find(text) + len(text)) for split, text in texts.items()}
    assert ends["train"][0] == 0
    assert ends["test"][1] == len(genome)
    assert ends["val"][0] - ends["train"][1] == ends["test"][0] - ends["val"][1] == 600  # 1 %: a short one's gap
    assert "one document" in data.summary["split"]["how"]
    for split, (start, stop) in ends.items():
        assert f"{split} {start:,} to {stop:,}" in data.summary["split"]["how"]
        assert parts[split].bytes == stop - start == len(parts[split].tokens) - 1


def test_byte_pairs_of_sequences_are_refused(data_folder):
    install(data_folder, "human-dna", EMBL)
    with pytest.raises(UserError, match=r"human-dna holds sequences, and bpe learns inside words.*dna6"):
        prepare(DataConfig(source="human-dna", tokenizer="bpe", context=2))


def test_code_of_packages():
    torch_source = resolve("torch-source")
    assert torch_source.label.startswith("torch-source of torch ")
    assert any(file.name == "nn/modules/linear" for file in torch_source.files)


@given(st.text("ACGTN", min_size=4, max_size=40), st.text("ACGTN", max_size=60), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_shared_words_are_those_that_python_finds(held_out, training, word):
    def words(text):
        return [text[i : i + word] for i in range(len(text) - word + 1) if "N" not in text[i : i + word]]

    other = reverse_complement(training.encode()).decode()
    assert reverse_complement(other.encode()).decode() == training
    asked = words(held_out)
    if not asked:
        with pytest.raises(ValueError, match="at least one word"):
            shared_share(held_out.encode(), training.encode(), word)
        return
    same, both = set(words(training)), set(words(training)) | set(words(other))
    expected = tuple(sum(w in known for w in asked) / len(asked) for known in (same, both))
    assert shared_share(held_out.encode(), training.encode(), word) == pytest.approx(expected)


def test_a_genome_is_trained_on_both_ways_and_filled_in(data_folder, tmp_path, capsys):
    import random

    from clearhead import cli

    genome = "".join(random.Random(0).choices("ACGT", k=20_000))
    install(data_folder, "ecoli", f">gi|1| E. coli\n{genome}\n".encode())
    quick = ["--model", "tiny", "--model.width", "16", "--model.layers", "1", "--steps", "2", "--context", "32"]
    quick += ["--data", "ecoli", "--train.test-tokens", "300", "--train.eval-tokens", "300", "--train.threads", "1"]
    causal, masked = str(tmp_path / "causal"), str(tmp_path / "masked")
    assert cli.main(["train", "--out", causal, *quick, "--data.tokenizer", "dna3"]) == 0
    assert cli.main(["train", "--out", masked, *quick, "--data.tokenizer", "dna", "--task", "masked_lm"]) == 0
    for run in (causal, masked):
        assert cli.main(["evaluate", run, "--tokens", "200", "--context", "64"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", masked, "--prompt", "ACGT[MASK]CC"]) == 0
    filled = capsys.readouterr().out.strip()
    assert filled[:4] + filled[5:] == "ACGTCC"
    assert filled[4] in "ACGTN"
