"""Entry by entry, by what changed, and where: SCE, PCB, RAM, WIDEN, and swaps between two models."""
