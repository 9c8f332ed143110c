"""`peerd doctor`: looks at this machine and at the swarm, and says what is wrong and how to mend it."""
