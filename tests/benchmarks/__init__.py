"""Benchmarks of the strategy bank: kills, retention, poison, scale, index, trust and malformed imports."""
