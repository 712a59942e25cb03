"""What runs on a rented machine with a GPU."""
