"""One training run: its config, the step, the loop around it, checkpoints, evaluation; see docs/architecture.md."""
