"""The protocol between programs on this machine and a daemon on its socket, and a Python client of it
(spec/local-api.md).
"""
