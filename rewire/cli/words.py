"""Options that hold several names; see :mod:`rewire.words`."""

from rewire.words import pairs, words

__all__ = ["pairs", "words"]
