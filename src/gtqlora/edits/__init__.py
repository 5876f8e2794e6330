"""Edits of a model: on disk, in training, merged into a checkpoint."""
