"""One module per model family: checkpoint configuration and names to a `DecoderSpec`."""
