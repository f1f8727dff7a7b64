"""The command line: flags to Settings, then launch."""
