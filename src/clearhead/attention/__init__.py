"""Attention as an algebra: tensors in, tensors out. The public names are those of `clearhead` itself."""
