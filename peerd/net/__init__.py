"""One connection a peer: transport, websocket, streams, circuits, the door."""
