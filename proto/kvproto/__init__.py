"""The wire and the vocabulary that the daemon and its clients share.

Hot frames (`frames`, drawn in WIRE.md), gRPC stubs (`control_pb2`), namespace identity, block keys,
limits and error codes. Imports nothing of ours.
"""
