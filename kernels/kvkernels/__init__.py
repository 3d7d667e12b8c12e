"""Leaf compute: bytes in, bytes out. Each kernel has a plain reference beside it as its test oracle.

Imports nothing of ours. Copies release the GIL, hashes of more than 100 KB do; any thread.
"""
