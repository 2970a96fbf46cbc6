"""Deep and thin against shallow and wide at equal parameters; see README.md."""
