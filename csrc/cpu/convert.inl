// Blocks of stored entries to float32 and back, and the count of non-finite ones.

#if PYMERGE_F16C
inline int64_t load_f16_lanes(const u16_at* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  return i;
}
inline int64_t store_f16_lanes(const float* x, int64_t n, u16_at* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q))) break;  // the scalar code makes the quiet NaN
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
  return i;
}
#else
inline int64_t load_f16_lanes(const u16_at*, int64_t, float*) { return 0; }
inline int64_t store_f16_lanes(const float*, int64_t, u16_at*) { return 0; }
#endif

void load(Buffer x, int64_t n, float* y) {
  switch (x.dtype) {
    case Dtype::kBF16: {
      const u16_at* p = static_cast<const u16_at*>(x.data);
      for (int64_t i = 0; i < n; ++i) y[i] = __builtin_bit_cast(float, uint32_t{p[i]} << 16);
      return;
    }
    case Dtype::kF16: {
      const u16_at* p = static_cast<const u16_at*>(x.data);
      for (int64_t i = load_f16_lanes(p, n, y); i < n; ++i) y[i] = f16_to_float(p[i]);
      return;
    }
    case Dtype::kF32: {
      const f32_at* p = static_cast<const f32_at*>(x.data);
      for (int64_t i = 0; i < n; ++i) y[i] = p[i];
      return;
    }
    case Dtype::kF64: {
      const f64_at* p = static_cast<const f64_at*>(x.data);
      for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(p[i]);
      return;
    }
  }
}

// First the largest magnitude (cheap, in the stored width); only a block with a bad entry is counted.
int64_t count_bad16(const u16_at* x, int64_t n, int16_t infinity) {
  int16_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int16_t size = static_cast<int16_t>(x[i] & 0x7FFF);
    largest = size > largest ? size : largest;
  }
  if (largest < infinity) return 0;
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad += (x[i] & 0x7FFF) >= infinity;
  return bad;
}

int64_t count_bad32(const u32_at* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad += (x[i] & kMagnitudeBits) >= kInfinityBits;
  return bad;
}

// A finite float64 beyond float32's range counts: the arithmetic would see an infinity.
int64_t count_bad64(const f64_at* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad += (float_to_bits(static_cast<float>(x[i])) & kMagnitudeBits) >= kInfinityBits;
  }
  return bad;
}

// At most 2^31 entries.
int64_t count_bad(Buffer x, int64_t n) {
  switch (x.dtype) {
    case Dtype::kBF16:
      return count_bad16(static_cast<const u16_at*>(x.data), n, 0x7F80);
    case Dtype::kF16:
      return count_bad16(static_cast<const u16_at*>(x.data), n, 0x7C00);
    case Dtype::kF32:
      return count_bad32(static_cast<const u32_at*>(x.data), n);
    default:
      return count_bad64(static_cast<const f64_at*>(x.data), n);
  }
}

void copy_out(const void* from, void* to, int64_t bytes, bool stream) {
#if PYMERGE_AVX512
  if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    const __m512i* p = static_cast<const __m512i*>(from);
    __m512i* q = static_cast<__m512i*>(to);
    for (int64_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(q + i, _mm512_load_si512(p + i));
    return;
  }
#endif
#if defined(__x86_64__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    const __m128i* p = static_cast<const __m128i*>(from);
    __m128i* q = static_cast<__m128i*>(to);
    for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(q + i, _mm_load_si128(p + i));
    __builtin_memcpy(q + bytes / 16, p + bytes / 16, static_cast<size_t>(bytes % 16));
    return;
  }
#endif
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
}

void convert(const float* x, int64_t n, Dtype dtype, void* y) {
  switch (dtype) {
    case Dtype::kBF16: {
      u16_at* p = static_cast<u16_at*>(y);
      for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(x[i]);
      return;
    }
    case Dtype::kF16: {
      u16_at* p = static_cast<u16_at*>(y);
      for (int64_t i = store_f16_lanes(x, n, p); i < n; ++i) p[i] = float_to_f16(x[i]);
      return;
    }
    case Dtype::kF32: {
      u32_at* p = static_cast<u32_at*>(y);
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_to_bits(x[i]);
        p[i] = (bits & kMagnitudeBits) > kInfinityBits ? kNanF32 : bits;
      }
      return;
    }
    case Dtype::kF64: {
      f64_at* p = static_cast<f64_at*>(y);
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_to_bits(x[i]);
        p[i] = static_cast<double>(bits_to_float((bits & kMagnitudeBits) > kInfinityBits ? kNanF32 : bits));
      }
      return;
    }
  }
}

// Rounds a block to `dtype` in memory; returns how many stored entries are not finite. scratch: 2 blocks.
int64_t store(const float* x, int64_t n, Dtype dtype, void* y, bool stream, float* scratch) {
  if (!stream) {
    convert(x, n, dtype, y);
    return count_bad({y, dtype}, n);
  }
  convert(x, n, dtype, scratch);
  copy_out(scratch, y, n * item_size(dtype), true);
  return count_bad({scratch, dtype}, n);
}
