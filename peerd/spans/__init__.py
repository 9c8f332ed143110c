"""The blocks that this peer serves: how they are chosen, loaded, announced and moved."""
