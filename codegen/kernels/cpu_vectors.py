"""C++ text that the kernels for CPUs share: vectors, loads, sums and exponentials.

The vector extensions are those that GCC (from 12 on) and Clang share. A vector fills one register of the machine: what
does not is taken apart by the compiler, through memory (docs/decisions.md).
"""

from __future__ import annotations

import functools

import torch

MOST_LANES = 16
"""float32 of the widest register; widths that it divides are whole vectors everywhere."""


@functools.cache
def lanes() -> int:
    """float32 of a register here: AVX-512, AVX2, or four (NEON, SSE)."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def vectors(stored: str) -> str:
    """The shared text for kernels that read elements of a C++ type, ``"float"`` or ``"uint16_t"`` (bfloat16; also
    reads float32)."""
    return f"\n#define LANES {lanes()}\n{_TYPES}{_LOADS[stored]}{_HELPERS}"


_LOADS = {
    "float": """
static inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline float number(float x) { return x; }
static inline float stored(float x) { return x; }
""",
    "uint16_t": """
static inline Vec load(const uint16_t* p) {
  Halves h; std::memcpy(&h, p, sizeof h);
  UInt bits = __builtin_convertvector(h, UInt) << 16;
  Vec v; std::memcpy(&v, &bits, sizeof v); return v;
}
static inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline float number(float x) { return x; }
static inline float number(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y; std::memcpy(&y, &bits, sizeof y); return y;
}
static inline uint16_t stored(float x) {
  uint32_t bits; std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}
""",
}

_TYPES = """\
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t UInt __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
constexpr float LOWEST = -std::numeric_limits<float>::infinity();
"""

_HELPERS = """
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Halves of a vector exchanged, by the distance of what changes places; then everything that lies in all of them.
#if LANES == 16
#define SWAP_8(v) __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define ALL(v, of) of(v, SWAP_8(v)); of(v, SWAP_4(v)); of(v, SWAP_2(v)); of(v, SWAP_1(v))
#elif LANES == 8
#define SWAP_4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
#define SWAP_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#define ALL(v, of) of(v, SWAP_4(v)); of(v, SWAP_2(v)); of(v, SWAP_1(v))
#else
#define SWAP_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1)
#define SWAP_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2)
#define ALL(v, of) of(v, SWAP_2(v)); of(v, SWAP_1(v))
#endif
#define ADDED(v, w) v += w
#define HIGHER(v, w) v = larger(v, w)

static inline float sum(Vec v) { ALL(v, ADDED); return v[0]; }
static inline float highest(Vec v) { ALL(v, HIGHER); return v[0]; }

// The four sums of four vectors, with fewer shuffles than one by one: each step adds the halves of two in one.
static inline void four_sums(const Vec* v, float* to) {
#if LANES == 16
#define LOW_8(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_8(a, b) __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOW_4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define HIGH_4(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
  const Vec ab = LOW_8(v[0], v[1]) + HIGH_8(v[0], v[1]), cd = LOW_8(v[2], v[3]) + HIGH_8(v[2], v[3]);
  Vec all = LOW_4(ab, cd) + HIGH_4(ab, cd);
  all += SWAP_2(all);
  all += SWAP_1(all);
#elif LANES == 8
#define LOW_4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH_4(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define LOW_2(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13)
#define HIGH_2(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15)
  const Vec ab = LOW_4(v[0], v[1]) + HIGH_4(v[0], v[1]), cd = LOW_4(v[2], v[3]) + HIGH_4(v[2], v[3]);
  Vec all = LOW_2(ab, cd) + HIGH_2(ab, cd);
  all += SWAP_1(all);
#else
#define LOW_2(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define HIGH_2(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#define LOW_1(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define HIGH_1(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
  const Vec ab = LOW_2(v[0], v[1]) + HIGH_2(v[0], v[1]), cd = LOW_2(v[2], v[3]) + HIGH_2(v[2], v[3]);
  const Vec all = LOW_1(ab, cd) + HIGH_1(ab, cd);
#endif
  for (int i = 0; i < 4; i++) to[i] = all[i * (LANES / 4)];
}

// e^x by powers of two and a polynomial (Cephes), 2 units in the last place; 0 below -87, NaN stays.
static inline Vec exponential(Vec x) {
  Int n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? splat(-0.5f) : splat(0.5f)), Int);
  n = n < -126 ? Int{} - 126 : n;
  const Vec f = __builtin_convertvector(n, Vec), r = (x - f * 0.693359375f) + f * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Int bits = (n + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vec{} : p * power;
}

static inline Vec capped(Vec x, float cap) {  // cap * tanh(x / cap)
  Vec twice = x * (2.0f / cap);
  twice = twice > 40.0f ? splat(40.0f) : twice < -40.0f ? splat(-40.0f) : twice;
  return cap - 2.0f * cap / (exponential(twice) + 1.0f);
}

"""
