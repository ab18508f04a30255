"""``python -m rewire`` is the ``rewire`` command."""

from rewire.cli import main

main()
