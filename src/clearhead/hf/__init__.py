"""Hugging Face models with clearhead's attention: patch, unpatch, save, load."""
