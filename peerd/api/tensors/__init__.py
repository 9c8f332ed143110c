"""Hidden states, sessions and gradients over a websocket."""
