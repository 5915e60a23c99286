"""Decoder graphs: one writer for every source of weights."""
