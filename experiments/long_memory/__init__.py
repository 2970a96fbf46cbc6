"""Which layers need a long memory? See README.md."""
