"""What a model is: its description, its layers, its weights."""
