"""Real text: catalogue and fetching, splits by document, tokenizers, token files, batches.

`config.py` says what to read, `catalogue.py` what is known, `text.py` (`prepare`) turns both into batches
and documents.
"""
