"""Metrics, traces and logs: every name once."""
