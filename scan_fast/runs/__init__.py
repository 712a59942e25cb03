"""A run on disk: its configuration, its folder, its checkpoints and what it reports while it works."""
