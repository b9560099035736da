"""Shards: their manifest, the order of samples, streaming, the cache; `dataset` for any program."""
