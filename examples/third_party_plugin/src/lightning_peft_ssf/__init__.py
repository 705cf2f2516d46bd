"""SSF as a plugin for lightning-peft. The entry point names the class in ssf.py; nothing needs to be exported here."""
