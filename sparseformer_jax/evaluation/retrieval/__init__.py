"""Retrieval: what a model finds in a text, by the text's length and the depth it stands at."""
