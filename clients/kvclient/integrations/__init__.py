"""Adapters that speak `kvclient` for an inference engine. None is imported unless asked for by name."""
