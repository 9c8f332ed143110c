"""One connection for each peer: transports, websockets, streams, circuits, and limits for incoming connections."""
