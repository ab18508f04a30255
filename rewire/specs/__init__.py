"""Models by name: ``resolve("timm:vit_tiny_patch16_224").build()`` gives a model, inputs and a loss to try it with.

Nothing is downloaded: weights are random, and so are inputs. Each source has a file here.
"""

from rewire.specs.resolve import resolve
from rewire.specs.spec import Example, Spec

__all__ = ["Example", "Spec", "resolve"]
