"""The model server: one process per device; rank 0 holds the engine."""
