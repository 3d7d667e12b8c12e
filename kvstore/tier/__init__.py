"""The disk tier: byte format (FORMAT.md), slots and segments, promotion, demotion, recovery. No I/O of its own."""
