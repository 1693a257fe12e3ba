"""Frames in flight: what is requested, what enters, the denoising batch, and what leaves."""
