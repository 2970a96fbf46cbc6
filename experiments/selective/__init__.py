"""Selective Self-Attention's claims, one by one: see README.md."""
