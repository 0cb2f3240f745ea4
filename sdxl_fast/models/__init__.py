"""SDXL networks: their shapes as data, loading them safely, LoRA files, text conditioning."""
