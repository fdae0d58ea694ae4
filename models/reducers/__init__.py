"""Parts of token reduction that carry weights, one family per file."""
