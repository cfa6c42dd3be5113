"""Measuring a server from outside: load over HTTP, the shapes of it, and what to say about the result."""
