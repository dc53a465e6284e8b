"""Map tiles in which every patch of ground has the colour of its class."""

__version__ = "0.1.0"
