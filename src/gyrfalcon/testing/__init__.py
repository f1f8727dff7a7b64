"""Fakes and tiny checkpoints, public: for our tests and for those who build on Gyrfalcon."""
