"""Training a small encoder from a folder of images."""
