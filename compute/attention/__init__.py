"""Attention over the pages of the KV pool: ragged, paged, latent, and families' own."""
