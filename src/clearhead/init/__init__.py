"""The init room; see docs/architecture.md."""
