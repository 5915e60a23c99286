"""Architectures built straight from config.json and safetensors, without torch."""
