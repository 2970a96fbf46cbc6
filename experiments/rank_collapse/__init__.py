"""Rank collapse and the growth of attention scores, predicted and measured."""
