"""Finding and reading checkpoint files; nothing here executes what it reads."""
