"""The command line, ``tp-cosep``; nothing here is imported before its command is run."""
