// Refuses compiler flags that would change results or forbid vector code.
#pragma once

#if defined(__FAST_MATH__)
#error "build without -ffast-math: it changes results, and turns on flush-to-zero in the whole process"
#endif
#if defined(__GNUC__) && !defined(__NO_MATH_ERRNO__)
#error "build with -fno-math-errno: a square root that may set errno does not vectorise"
#endif
