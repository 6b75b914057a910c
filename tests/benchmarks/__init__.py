"""Benchmarks of the strategy bank: kills, retention, poison, scale, index and malformed imports."""
