"""Programs to start from; each runs as `python -m sdxl_fast.examples.NAME --help`."""
