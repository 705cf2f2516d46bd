"""The command `lightning-peft`: `__main__` chooses, and one module here does each command.

training.py fits and measures (LightningCLI), commands.py merges and exports, listing.py lists the methods.
"""
