"""Training: the jitted step, the loop around it, and supervised fine-tuning on top."""
