"""Embeddings of texts: the mean of a model's last hidden states."""
