"""Who runs next, and on which blocks. Pure Python: no I/O, no clock, no chance."""
