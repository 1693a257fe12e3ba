"""What a frame is drawn under: prompts and their blends, control images, known regions."""
