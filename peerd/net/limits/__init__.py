"""How many strangers get in, as whom they count, and how often they may ask."""
