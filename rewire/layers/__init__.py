"""Kinds of layers: where their features are, which weight they use, how to run them with another backward."""
