"""The hybrid family."""
