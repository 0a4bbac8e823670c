"""The models: what distinguishes each architecture, and the decoder that runs them all."""
