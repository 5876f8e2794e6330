"""Public sets of prompts become contrast sets: what a model is asked, in which order, and the rows of what it says."""
