"""Metrics and benchmarks, for eval.py and for validation during training."""
