"""Model families: config.json to a decoder, safetensors to its weights."""
