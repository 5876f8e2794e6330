"""A certified edit in the forms that other programs load: each format plans, writes, and says how it is run."""
