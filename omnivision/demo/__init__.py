"""Small films of a drawn person who moves: data to try every stage of the project on without downloading anything."""
