"""Architectures of transformers that do not use its attention interface, made to use it.

`find` says which modules can be replaced (and refuses what cannot be), `install` swaps their classes in place, `remove`
swaps them back. One file an architecture; `table.py` lists them, and the reasons of the refusals.
"""

from clearhead._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "find": "clearhead.hf.replace.swap:find",
        "install": "clearhead.hf.replace.swap:install",
        "tell": "clearhead.hf.replace.swap:tell",
        "remove": "clearhead.hf.replace.swap:remove",
    },
)
