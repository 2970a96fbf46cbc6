"""Generated tasks for long contexts: one file a task, drawn by (seed, split, index)."""
