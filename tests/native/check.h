// The smallest test harness that does: CHECK prints what failed and where, and the process exits with the count.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      if (++failures > 20) return failures;                               \
    }                                                                     \
  } while (false)
