"""The lifecycle family."""
