"""Strategies that stay in the model: training that makes plain answers as good as guided ones."""
