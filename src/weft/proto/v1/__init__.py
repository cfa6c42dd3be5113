"""Generated from proto/weft/v1; `make proto` writes it again."""
