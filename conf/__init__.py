"""Every choice that a user makes, and its schema."""

__version__ = "0.2.0"
