"""The tasks room: what training reads, learns and is scored by; one file a task."""
