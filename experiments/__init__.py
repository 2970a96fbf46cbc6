"""One folder per question; each has a README with the command, the result and the verdict."""
