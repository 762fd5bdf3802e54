"""Other projects' names and call signatures, on our ops."""
