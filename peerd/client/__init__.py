"""A model as its user sees it: text in, tokens out."""
