"""Whether others can dial us; relays, reservations, dial-back."""
