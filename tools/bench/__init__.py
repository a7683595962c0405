"""Benchmarks: `python -m tools.bench`. What each command measures stands in its own file."""
