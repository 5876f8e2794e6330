"""Models behind servers that speak OpenAI's protocol: what they say, and whether they are ours."""
