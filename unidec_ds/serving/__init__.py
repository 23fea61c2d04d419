"""A trained run answering texts: label vectors, search, new labels, the prompt."""
