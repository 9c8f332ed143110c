"""One connection between two peers: frames, Noise, streams, liveness."""
