"""What is derived from the logs: each can be rebuilt from them."""
