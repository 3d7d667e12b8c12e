"""Benchmarks and the demonstration. Run from the repository root, never installed.

python -m bench NAME     measure, write JSON (`harness` is what the benchmarks share)
python -m bench.demo     see a model's KV cache leave one process and come back in another
"""
