"""Planted faults, which show that the checks of this room can fail."""
