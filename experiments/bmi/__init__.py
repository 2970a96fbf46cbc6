"""Does telling neighbouring segments apart help a language model? See README.md."""
