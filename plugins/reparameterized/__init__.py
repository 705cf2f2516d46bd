"""The reparameterized family."""
