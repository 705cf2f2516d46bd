"""The first-party methods, each found by its entry point in the group `lightning_peft.methods`."""
