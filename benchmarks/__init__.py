"""Measurements: ``python -m benchmarks NAME`` prints a table for ``benchmarks/README.md``."""
