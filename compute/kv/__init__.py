"""The KV pool: pages, layout, one row's cache."""
