"""One file per relation between checkpoints."""
