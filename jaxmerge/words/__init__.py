"""Pillar 2: which bytes become one word? Splitters on the host; segments, gates and controllers as pure functions."""
