// Marks what Python calls: plain C functions, the only symbols that the library shows.
#pragma once

#define GYRFALCON_EXPORT extern "C" __attribute__((visibility("default")))
