"""Diffusion as mathematics on arrays: schedules, predictions, guidance, solvers. Nothing here knows a model."""
