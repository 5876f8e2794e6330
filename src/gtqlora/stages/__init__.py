"""One file a verb: each stage is `stage(config, run) -> frozen result`."""
