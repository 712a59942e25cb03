"""The stages of a run: pretext, mining, clustering and self-labelling, and the one loop that trains three of them."""
