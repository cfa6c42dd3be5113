"""One command: resolve, start, watch, restart, stop. Reaches the server by process, never by import."""
