"""What each stage leaves in a run directory, typed, with its file name, reader and writer."""
