"""Helpers of the tests: tiny random models of the real classes, tiny data in the real formats, runs in subprocesses."""
