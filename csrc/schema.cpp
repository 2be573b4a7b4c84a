// The table of contents of the native layer: every operator's schema. T tasks; all tensors of one call have one shape
// (n entries) and any of bfloat16, float16, float32, float64; R rows of row_length entries (0: one row of n). Cuts are
// [T, R]: theta float32, index int64. `mask` means keep float[T] and keys int[T] (64-bit Philox keys).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pymerge, m) {
  // out = add + scale * (norm(sum_t x_t) / divisor), x_t = weight_t * rescale_t * selected(tuned_t - base)
  // bad int64 [T + 3]: non-finite entries of base, tuned_0 .. tuned_{T-1}, add (0 where add is base), out
  m.def(
      "delta_merge(Tensor? base, Tensor[] tuned, Tensor? add, float[] weights, float scale, float divisor, "
      "float[]? rescales, float[]? keep, int[]? keys, int row_length, Tensor? top_theta, Tensor? top_index, "
      "Tensor? skip_theta, Tensor? skip_index, bool elect, int tie_sign, str norm, ScalarType out_dtype) "
      "-> (Tensor out, Tensor bad)");
  // the ranks[t]-th largest |tuned_t - base| of each row (after the mask) and the index behind it: theta, index [T, R]
  m.def(
      "delta_kth(Tensor? base, Tensor[] tuned, int[] ranks, int row_length, float[]? keep, int[]? keys) "
      "-> (Tensor theta, Tensor index)");
  // hist [T, 65536] of bits(|d|) >> 15, or, given prefix [T], [T, 32768] of bits(|d|) & 0x7fff where bits >> 15 ==
  // prefix
  m.def("delta_histogram(Tensor? base, Tensor[] tuned, float[]? keep, int[]? keys, int[]? prefix) -> Tensor hist");
  // float64 [T, 2]: ||d_t||_1 and ||selected d_t||_1
  m.def(
      "delta_l1(Tensor? base, Tensor[] tuned, float[]? keep, int[]? keys, int row_length, Tensor? top_theta, "
      "Tensor? top_index, Tensor? skip_theta, Tensor? skip_index) -> Tensor norms");
  // float64 [T, T]: inner products of the flattened d_t
  m.def("delta_gram(Tensor? base, Tensor[] tuned) -> Tensor gram");
  // int64 []: sum over entries of sign(sum_t x_t)
  m.def(
      "delta_signs(Tensor? base, Tensor[] tuned, float[] weights, float[]? rescales, float[]? keep, int[]? keys, "
      "int row_length, Tensor? top_theta, Tensor? top_index, Tensor? skip_theta, Tensor? skip_index) -> Tensor total");
  // out float32 [T, r, n] = Q_t^T (tuned_t - base); basis Q [m, r] or [T, m, r], base and tuned_t [m, n]
  m.def("project_delta(Tensor basis, Tensor? base, Tensor[] tuned, str precision) -> Tensor out");
  // float64 [T, r] each, of the rows a of that product: <p, a> with the rows p of reference [r, n] or [T, r, n], <a, a>
  m.def(
      "projection_stats(Tensor basis, Tensor reference, Tensor? base, Tensor[] tuned, str precision) "
      "-> (Tensor inner, Tensor square)");
  // y = x (float32) as dtype, nearest even; bad int64 []: non-finite entries of y
  m.def("finite_cast(Tensor x, ScalarType dtype) -> (Tensor y, Tensor bad)");
  // upper triangle of cov [(B,) n, n] += alpha * x^T x, x [(B,) N, n], or, small, cov [(B,) N, N] += alpha * x x^T
  // mask bool [(B,) N]: rows of x that count; precision of the products: float32 | float64; the rest of cov stays
  m.def(
      "cov_accumulate(Tensor(a!) cov, Tensor x, float alpha=1.0, Tensor? mask=None, bool small=False, "
      "str precision=\"float32\") -> ()");
  // float64 [..., n, n] = x^T x of each [m, n]
  m.def("gram64(Tensor x) -> Tensor gram");
  // a [..., m, n] Omega [n, width] -> [..., m, width], float32 (float64 for float64); Omega of (seed, row, column),
  // kind gaussian (variance 1) or sparse_sign (8 entries +-1/sqrt(8) a row)
  m.def("sketch(Tensor a, int width, str kind, int seed) -> Tensor");
  // score [B, n, m] bfloat16, float16 or float32: column of each row (-1: none) int64 [B, n], prices float64 [B, n] and
  // [B, m], and float64 [B, 3]: primal, dual, gap. `prices` float64 [B, m] to start from, tolerance: gap a row
  m.def(
      "assign(Tensor score, bool maximize, Tensor? prices, float? tolerance) "
      "-> (Tensor columns, Tensor row_prices, Tensor col_prices, Tensor value)");
}
