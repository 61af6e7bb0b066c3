"""The frozen language model: loading it, and its linear layers."""
