"""A small head that guesses a model's next tokens from its last hidden states: the network, its files, its training."""
