"""Frozen encoders: captions to text features, images to latents."""
