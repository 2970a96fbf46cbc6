"""Closed forms, one function per component, torch-free: moments in, moments out; see docs/signal.md."""
