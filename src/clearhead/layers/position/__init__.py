"""The position room; see docs/architecture.md."""
