"""Text side: calls in our own parameter names to token ids and back. The door is `interface`."""
