"""Pure maths on tensors: no model, no files, no tables."""
