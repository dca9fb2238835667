"""The miniature benchmark: five drawn question-answering domains and a general set, made from seeds alone."""

from .write import SIZES, ensure_mini_dcl, generator_hash, write_mini_dcl

__all__ = ["SIZES", "ensure_mini_dcl", "generator_hash", "write_mini_dcl"]
