"""Device side: runs one step's plan and proposes tokens. Torch begins here; the door is `interface`."""
