"""Video models by the PPMA recipe. Importing this package imports nothing heavy."""
