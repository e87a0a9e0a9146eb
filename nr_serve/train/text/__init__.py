"""The text that training reads: documents, from files and data sets, packed into windows of tokens."""

from nr_serve.train.text.read import read_classes, read_heldout

__all__ = ["read_classes", "read_heldout"]
