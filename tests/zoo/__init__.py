"""The model zoos, each model under each rule: ``python -m tests.zoo``."""
