"""Everything between strings and token ids. No torch."""
