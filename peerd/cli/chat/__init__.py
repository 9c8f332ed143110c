"""`peerd chat`: a conversation in the terminal."""
