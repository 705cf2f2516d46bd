"""The additive family."""
