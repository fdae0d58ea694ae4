"""What there is to merge."""
