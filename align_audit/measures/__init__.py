"""Pure functions of tensors, one concept a file; they know no model, no file and no log."""
