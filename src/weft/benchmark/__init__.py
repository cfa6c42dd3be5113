"""Load models and reports of `weft bench`."""
