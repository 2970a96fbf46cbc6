"""Putting LASER's claims to the test; see README.md."""
