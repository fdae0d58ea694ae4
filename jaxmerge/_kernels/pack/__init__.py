"""Hard deletion: the kept rows, packed to the left."""
