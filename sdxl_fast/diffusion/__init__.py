"""The one place for each diffusion formula: schedule, prediction conversions, the deterministic move, samplers."""
