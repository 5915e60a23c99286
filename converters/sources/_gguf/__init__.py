"""GGUF files: header and tensor types, read without trust."""
