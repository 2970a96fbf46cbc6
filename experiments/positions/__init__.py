"""Positions beyond the training length; see README.md."""
