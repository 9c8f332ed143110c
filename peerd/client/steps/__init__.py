"""The steps of an answer: what is sent for its rows, ahead of what is certain too, and the answers in order."""
