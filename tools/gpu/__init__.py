"""The suite for a machine with a GPU, the module that is carried there, and the record of what has passed."""
