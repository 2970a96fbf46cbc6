"""The anatomy room: which module of a model plays which part, for our models, Hugging Face, timm and plain torch."""
