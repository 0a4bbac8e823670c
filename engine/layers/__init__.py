"""What models are made of: linear maps over weight formats, rotary frequencies."""
