import gzip
import json

import pytest

from clearhead.data.sources import resolve
from clearhead.errors import UserError


def texts(source):
    return {document.name: document.data.decode() for document in resolve(str(source)).documents()}


def test_a_folder_gives_its_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.TXT").write_text("ay")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"sea"))
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 4}\n')
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    assert list(texts(tmp_path).items()) == [
        ("b", "bee"),
        ("c", "sea"),
        ("d.jsonl:1", "one"),
        ("d.jsonl:3", "two"),
        ("sub/a", "ay"),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_plain_and_packed(tmp_path, packed):
    data = "".join(json.dumps({"text": f"é {i}"}) + "\n" for i in range(3)).encode()
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(texts(path).values()) == ["é 0", "é 1", "é 2"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "y.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert set(texts(tmp_path).values()) == {"hello"}


def test_the_digest_follows_names_and_bytes(tmp_path):
    (tmp_path / "x.txt").write_text("one")
    first = resolve(str(tmp_path)).digest()
    assert resolve(str(tmp_path)).digest() == first
    (tmp_path / "x.txt").write_text("two")
    second = resolve(str(tmp_path)).digest()
    (tmp_path / "x.txt").rename(tmp_path / "y.txt")
    assert len({first, second, resolve(str(tmp_path)).digest()}) == 3


BAD_FILES = {
    "latin1.txt": ("caf\xe9".encode("latin1"), r"latin1.txt: byte 3 \(0xe9\) is not UTF-8; convert"),
    "latin1.jsonl": (b'{"text": "ok"}\n{"text": "\xe9"}\n', r"latin1.jsonl, line 2: byte 10 \(0xe9\) is not UTF-8"),
    "cut.txt.gz": (gzip.compress(b"hello world" * 99)[:-12], "cut.txt.gz: the gzip file ends too early"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 99)[:-12], "cut.jsonl.gz: the gzip file ends too early"),
    "no.txt.gz": (b"plain text", "no.txt.gz: not a valid gzip file"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "b', "half.jsonl, line 2: not a JSON object"),
    "list.jsonl": (b"[1, 2]\n", 'list.jsonl, line 1: expected an object with the key "text", got list'),
    "key.jsonl": (b'{"txt": "a", "id": 1}\n', r"the key \"text\" is missing .did you mean 'txt'.*keys: 'txt', 'id'"),
    "type.jsonl": (b'{"text": null}\n', '"text" must be a string, got NoneType'),
    "pair.jsonl": (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_in_one_line(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("shakespear", r"no data set and no file is called 'shakespear' .did you mean 'shakespeare'"),
        ("no/such/file.txt", "no such file or folder: no/such/file.txt"),
        ("absent.txt", "no such file or folder: absent.txt"),
    ],
)
def test_a_source_that_does_not_exist(source, message):
    with pytest.raises(UserError, match=message):
        resolve(source)


def test_files_and_folders_without_readable_text(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"a.pdf: not a kind of file that is read"):
        resolve(str(tmp_path / "a.pdf"))
    with pytest.raises(UserError, match="holds no text that is read"):
        resolve(str(tmp_path))


def test_the_standard_library_needs_no_network_and_leaves_tests_out():
    source = resolve("python-stdlib")
    names = {file.name for file in source.files}
    assert {"os", "argparse", "json/decoder"} <= names
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]
    assert source.licence == "PSF-2.0"
