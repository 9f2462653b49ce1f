"""One command for a machine with a GPU: is training right there, how fast is it, and what does the recipe give?"""
