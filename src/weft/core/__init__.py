"""The shared language of router, scheduler and runner: no I/O, no clock, no chance, no torch."""
