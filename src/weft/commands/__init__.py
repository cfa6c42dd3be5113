"""What a user types besides serve."""
