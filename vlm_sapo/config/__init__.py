"""The sections of a config, and how files become one."""
