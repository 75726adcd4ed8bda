"""Servers: honest ones, and those that send traps."""
