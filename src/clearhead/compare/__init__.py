"""The compare room; see docs/architecture.md."""
