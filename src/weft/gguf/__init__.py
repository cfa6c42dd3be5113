"""The GGUF container, as far as both halves read it: the router its tokenizer, the shard its configuration."""
