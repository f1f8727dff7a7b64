"""Building blocks of decoders: parameters with a forward that takes all it depends on."""
