"""Which peers serve which blocks, how near they are, and which ones could replace a hop."""
