"""The atoms: keep a part, weigh, elect, reduce; masks, layers."""
