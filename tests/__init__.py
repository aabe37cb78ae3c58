"""Tests, in a mirror of the tree."""
