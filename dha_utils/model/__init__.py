"""The Decoupled-Head Attention model in transformers."""
