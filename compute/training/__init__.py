"""Forward and backward for training, in turns: memory, tapes, and the client's trained tensors."""
