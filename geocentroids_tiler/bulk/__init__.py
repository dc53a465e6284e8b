"""Many images at once: labels of a whole list of them, with a STAC catalogue that says what is where."""
