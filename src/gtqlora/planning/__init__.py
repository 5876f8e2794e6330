"""What a training will take, from a config.json alone: memory by part, what fits where, and how long it lasts."""
