"""Benchmarks of the strategy bank, and log-probabilities of sampling and training for many architectures."""
