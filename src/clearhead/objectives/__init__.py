"""The objectives room; see docs/architecture.md."""
