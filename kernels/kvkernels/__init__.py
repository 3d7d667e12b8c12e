"""Leaf compute: bytes in, bytes out. Each kernel has a plain reference beside it as its test oracle.

Imports nothing of ours. Everything here releases the GIL while it works and may run on any thread.
"""
