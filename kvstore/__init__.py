"""The storage engine: index, prefix tree, arenas and slots, leases, tickets, eviction.

Synchronous, single-threaded, deterministic: clock, randomness and memory come through `ports`, so that a whole
life of the store can be replayed from a seed. `store.Store` has the verbs; `blocks` the table they walk.
"""
