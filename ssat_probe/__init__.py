"""Train Vision Transformers on limited data, probe them, compare them."""
