"""The training loop, its step, precision and process settings."""
