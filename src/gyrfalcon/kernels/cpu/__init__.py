"""The operations on a CPU in C++ (csrc/): the library, the packed weights and their file."""
