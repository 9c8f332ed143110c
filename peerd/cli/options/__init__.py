"""The options of the command, and the rules that hold among them."""
