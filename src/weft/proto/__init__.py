"""The wire: generated stubs, and `convert` between core values and messages."""
