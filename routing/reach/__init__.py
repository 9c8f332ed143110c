"""Whether a peer can be dialled, judged from what others saw."""
