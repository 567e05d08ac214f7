"""Diffusion as mathematics on arrays: schedules, predictions, guidance, solvers. No file here knows a model."""
