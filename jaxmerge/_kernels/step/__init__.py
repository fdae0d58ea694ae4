"""A whole step of Token Merging: match, choose, merge."""
