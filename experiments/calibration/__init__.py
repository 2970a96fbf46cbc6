"""Do the verdicts of `clearhead compare` keep their promises? See README.md."""
