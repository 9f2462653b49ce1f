"""One command for a machine with a GPU: is training there right, how fast is it, and what does the recipe give in some minutes."""
