"""The safety floor: which refusals are kept, and how often held-out prompts were used."""
