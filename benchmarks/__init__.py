"""Timing, for bench.py."""
