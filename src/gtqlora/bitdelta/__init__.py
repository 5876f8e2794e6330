"""A fine-tune as one bit a weight on top of its base: compressed, applied, served."""
