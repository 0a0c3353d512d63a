"""Benchmarks and tuning, with the same code as a run: `disttrain bench`, `tune` and `data bench`."""
