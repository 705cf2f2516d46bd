"""The selective family."""
