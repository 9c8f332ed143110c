"""Running state: what blocks of convolutions and linear attention keep of a row instead of keys and values."""
