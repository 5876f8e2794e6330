"""Who tells a refusal from an answer, and which judges may run code."""
