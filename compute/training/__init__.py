"""Forward and backward in turns, tapes, and what a client trains."""
