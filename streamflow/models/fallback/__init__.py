"""The family that draws with whole calls of any pipeline."""
