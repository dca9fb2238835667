"""Bases that write their answers token by token."""
