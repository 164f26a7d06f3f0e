"""A Flower App that looks for everything on a silo's machine."""
