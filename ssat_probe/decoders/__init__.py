"""One file per decoder."""
