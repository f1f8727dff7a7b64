"""The dialects: bytes to calls, deltas to bytes. No policy lives here."""
