"""The memory room; see docs/architecture.md."""
