"""The local API: HTTP on a unix socket, and on TCP if asked (spec/local-api.md)."""
