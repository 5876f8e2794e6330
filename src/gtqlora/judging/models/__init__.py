"""Judges that are models: a sequence classifier, guard models, and a chat model behind a server."""
