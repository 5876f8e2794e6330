"""A run's artefacts as one self-contained HTML page; reads results only, never a model."""
