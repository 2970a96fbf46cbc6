"""Tests, in the tree of the package; `contract.py` is the contract that every mechanism keeps."""
