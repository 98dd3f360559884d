"""Benchmarks that say how they measured, and check results before they count times."""
