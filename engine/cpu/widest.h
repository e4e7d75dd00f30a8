// For the inner loops of CPU code: a function so marked is compiled for several kinds of processor, and the program takes
// the fitting version when it starts. Without it loops use what every x86-64 has, a quarter of AVX-512's width.
// Loops in it should be free of branches and calls (exp: engine/cpu/exp.h).
#pragma once

// Sanitizers and nvcc's front end do not know such functions.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define WEFT_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WEFT_WIDEST
#endif
