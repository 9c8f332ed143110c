"""Answers in a given form: what a grammar is, and which tokens it allows next."""
