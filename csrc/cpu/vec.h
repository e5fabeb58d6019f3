// One vector type per instruction set, written with the compiler's vector extension, and the storage formats that
// load into it. Everything lives in a namespace named after the instruction set (NEWLLM_ISA), because the same
// sources are compiled several times and inline functions of different instruction sets must not be merged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define NEWLLM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NEWLLM_VECTOR_BYTES 32
#else
#define NEWLLM_VECTOR_BYTES 16
#endif

#define NEWLLM_INLINE inline __attribute__((always_inline))

namespace newllm::cpu::NEWLLM_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef float FloatV __attribute__((vector_size(NEWLLM_VECTOR_BYTES)));
typedef double DoubleV __attribute__((vector_size(NEWLLM_VECTOR_BYTES)));
typedef int32_t Int32V __attribute__((vector_size(NEWLLM_VECTOR_BYTES)));
typedef uint32_t UInt32V __attribute__((vector_size(NEWLLM_VECTOR_BYTES)));
typedef uint16_t UInt16V __attribute__((vector_size(NEWLLM_VECTOR_BYTES / 2)));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
inline constexpr int64_t kLanes = NEWLLM_VECTOR_BYTES / sizeof(A);

template <class To, class From>
NEWLLM_INLINE To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <class A>
NEWLLM_INLINE Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

// ---- storage formats -------------------------------------------------------------------------------------------

NEWLLM_INLINE float half_to_float(uint16_t h) {
  // Shift exponent and mantissa into place, rescale by 2^112; Inf and NaN keep an all-ones exponent.
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t body = uint32_t(h & 0x7fffu) << 13;
  if (body >= 0x0f800000u) return bit_cast<float>(sign | 0x70000000u | body);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(body) * 0x1p112f));
}

NEWLLM_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  if (!(magnitude == magnitude)) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) {  // subnormal: let the adder round to the 2^-24 grid
    return uint16_t(sign | (bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t body = bits & 0x7fffffffu;
  return uint16_t(sign | ((body + 0xfffu + ((body >> 13) & 1u) - 0x38000000u) >> 13));
}

NEWLLM_INLINE FloatV widen(const bfloat16* p) {
#if defined(__AVX512F__)  // one conversion; the generic form is split into halves and put together again
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatV)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  UInt16V raw;
  std::memcpy(&raw, p, sizeof raw);
  return bit_cast<FloatV>(__builtin_convertvector(raw, UInt32V) << 16);
#endif
}

NEWLLM_INLINE FloatV widen(const float16* p) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (FloatV)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  FloatV v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = half_to_float(p[lane].bits);
  return v;
#endif
}

template <class A>
NEWLLM_INLINE Vec<A> widen(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Round to nearest even; a NaN stays a NaN.
NEWLLM_INLINE UInt16V narrow(FloatV v, bfloat16) {
  const UInt32V bits = bit_cast<UInt32V>(v);
  const UInt32V rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const UInt32V chosen = v == v ? rounded : (bits | 0x400000u);
  return __builtin_convertvector(chosen >> 16, UInt16V);
}

NEWLLM_INLINE UInt16V narrow(FloatV v, float16) {
#if defined(__AVX512F__)
  return (UInt16V)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (UInt16V)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  UInt16V out;
  for (int lane = 0; lane < kLanes<float>; ++lane) out[lane] = float_to_half(v[lane]);
  return out;
#endif
}

NEWLLM_INLINE FloatV narrow(FloatV v, float) { return v; }
NEWLLM_INLINE DoubleV narrow(DoubleV v, double) { return v; }

// ---- loads and stores of n <= kLanes elements --------------------------------------------------------------------

template <class T>
NEWLLM_INLINE Vec<acc_t<T>> load(const T* p) {
  return widen(p);
}

template <class T>
NEWLLM_INLINE Vec<acc_t<T>> load_part(const T* p, int64_t n) {
  alignas(NEWLLM_VECTOR_BYTES) T buffer[kLanes<acc_t<T>>] = {};
  for (int64_t k = 0; k < n; ++k) buffer[k] = p[k];
  return widen(buffer);
}

template <class T>
NEWLLM_INLINE void store(T* p, Vec<acc_t<T>> v) {
  const auto bits = narrow(v, T{});
  std::memcpy(p, &bits, sizeof bits);
}

template <class T>
NEWLLM_INLINE void store_part(T* p, Vec<acc_t<T>> v, int64_t n) {
  const auto bits = narrow(v, T{});
  std::memcpy(p, &bits, size_t(n) * sizeof(T));
}

// Outputs larger than this are streamed past the caches. Measured: from 8 MiB on streaming is faster, at 2 MiB it is
// not; whoever reads a tensor of this size next finds little of it in a second-level cache anyway.
inline constexpr int64_t kStreamingBytes = 6 << 20;

// A store that bypasses the caches: the line is not read first, which saves a third of a scan's traffic. It pays only
// for outputs too large to be found in cache by whoever reads them next, and needs an aligned address.
template <class T>
NEWLLM_INLINE void store_streaming(T* p, Vec<acc_t<T>> v) {
  const auto bits = narrow(v, T{});
#if defined(__x86_64__)
  if constexpr (sizeof bits == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)bits);
#endif
  } else if constexpr (sizeof bits == 32) {
#if defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#endif
  } else if constexpr (sizeof bits == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
  } else {
    std::memcpy(p, &bits, sizeof bits);
  }
#else
  std::memcpy(p, &bits, sizeof bits);
#endif
}

NEWLLM_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <bool kStreaming, class T>
NEWLLM_INLINE void store_as(T* p, Vec<acc_t<T>> v) {
  if constexpr (kStreaming) {
    store_streaming(p, v);
  } else {
    store(p, v);
  }
}

template <class T>
inline constexpr int64_t kStoreBytes = kLanes<acc_t<T>> * sizeof(T);

template <class T>
bool is_aligned(const void* p, int64_t stride_b, int64_t stride_t) {
  const auto bytes = reinterpret_cast<uintptr_t>(p) | uintptr_t(stride_b * int64_t(sizeof(T))) |
                     uintptr_t(stride_t * int64_t(sizeof(T)));
  return bytes % kStoreBytes<T> == 0;
}

// Calls body(offset, full vector?, elements) over [0, count); the last call may be partial. `body` is inlined twice,
// so the full-vector copy has no masks in it.
template <class A, class Body>
NEWLLM_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t k = 0;
  for (; k + kLanes<A> <= count; k += kLanes<A>) body(k, std::true_type{}, kLanes<A>);
  if (k < count) body(k, std::false_type{}, count - k);
}

template <class Full, class T>
NEWLLM_INLINE Vec<acc_t<T>> load_if(Full, const T* p, int64_t n) {
  if constexpr (Full::value) {
    return load(p);
  } else {
    return load_part(p, n);
  }
}

template <bool kStreaming, class Full, class T>
NEWLLM_INLINE void store_if(Full, T* p, Vec<acc_t<T>> v, int64_t n) {
  if constexpr (Full::value) {
    store_as<kStreaming>(p, v);
  } else {
    store_part(p, v, n);
  }
}

// Halves the vector until one lane is left: log2(lanes) dependent additions instead of lanes.
template <class V>
NEWLLM_INLINE auto sum_lanes(V v) {
  using Lane = std::remove_reference_t<decltype(v[0])>;
  constexpr int lanes = sizeof(V) / sizeof(Lane);
  if constexpr (lanes == 1) {
    return v[0];
  } else if constexpr (lanes == 2) {
    return Lane(v[0] + v[1]);
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof(V));
    return sum_lanes(Half(halves[0] + halves[1]));
  }
}

}  // namespace newllm::cpu::NEWLLM_ISA
