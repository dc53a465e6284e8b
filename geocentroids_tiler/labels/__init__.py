"""Labels of patches: computed in chunks, kept, shared."""
