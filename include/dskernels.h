/* The plain C ABI of dskernels. Tensors are DLPack's DLTensor, borrowed for the call.
 *
 * Every function returns 0, or -1 after storing a message that names the argument, what was
 * expected and what was given: dsk_last_error(), valid until the thread's next call. Nothing is
 * retained. Outputs are allocated by the caller and must not overlap inputs. num_threads <= 0
 * means one thread per CPU that the process may use. Optional tensors may be NULL.
 */
#ifndef DSKERNELS_H_
#define DSKERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define DSK_API __declspec(dllexport)
#else
#define DSK_API __attribute__((visibility("default")))
#endif

/* DLPack's structs, declared here unless its own header came first. */
#ifndef DLPACK_DLPACK_H_
typedef struct {
  int32_t device_type; /* 1: CPU */
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code; /* 0 int, 1 uint, 2 float, 4 bfloat, 6 bool, 10 float8_e4m3fn */
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; NULL: compact row-major */
  uint64_t byte_offset;
} DLTensor;
#endif

DSK_API const char* dsk_last_error(void);

/* The CPU target in use ("amx", "avx512_fp16", "avx512", "avx2", "portable"), and why. */
DSK_API const char* dsk_cpu_target(void);
DSK_API const char* dsk_cpu_target_reason(void);

/* ---- rowwise ---- */

/* x [m, k] (fp32 | bf16 | fp16) -> data [m, k] e4m3 and scale [ceil(m/bm), ceil(k/bk)] fp32 (any
 * strides). scale_format: 0 fp32, 1 rounded up to a power of two. Blocks: (1, 128), (128, 128). */
DSK_API int dsk_quantize(const DLTensor* x, const DLTensor* data, const DLTensor* scale,
                         int64_t block_m, int64_t block_k, int scale_format, int num_threads);

/* x [m, d], weight [d] -> y [m, d]. residual [m, d] and sum [m, d] come together or not at all. */
DSK_API int dsk_rms_norm(const DLTensor* x, const DLTensor* weight, const DLTensor* residual,
                         double eps, const DLTensor* y, const DLTensor* sum, int num_threads);

/* x [m, 2 i] = [gate; up] -> y [m, i]. */
DSK_API int dsk_swiglu(const DLTensor* x, const DLTensor* y, int num_threads);

/* The two fusions: the fp32 result is quantised in blocks of (1, 128), never stored wide. */
DSK_API int dsk_rms_norm_quantize(const DLTensor* x, const DLTensor* weight,
                                  const DLTensor* residual, double eps, const DLTensor* data,
                                  const DLTensor* scale, const DLTensor* sum, int scale_format,
                                  int num_threads);
DSK_API int dsk_swiglu_quantize(const DLTensor* x, const DLTensor* data, const DLTensor* scale,
                                int scale_format, int num_threads);

/* x [t, h, r], cos and sin fp32 [t, r/2] -> y [t, h, r]. */
DSK_API int dsk_rope(const DLTensor* x, const DLTensor* cos, const DLTensor* sin, int interleaved,
                     int inverse, const DLTensor* y, int num_threads);

/* ---- gemm ---- */

/* Bytes of the packed form of [n, k] e4m3 weights, and of its NaN marks (one per 64 n x 128 k). */
DSK_API int64_t dsk_packed_bytes(int64_t n, int64_t k);
DSK_API int64_t dsk_packed_marks(int64_t n, int64_t k);

/* b [g, n, k] e4m3 -> packed uint8 [g, dsk_packed_bytes], marks uint8 [g, dsk_packed_marks]; and
 * back. */
DSK_API int dsk_pack(const DLTensor* b, const DLTensor* packed, const DLTensor* marks,
                     int num_threads);
DSK_API int dsk_unpack(const DLTensor* packed, const DLTensor* b, int num_threads);

/* y [m, n] = x [m, k] times b [n, k] transposed, + c [m, n], + bias [n], added in fp32.
 * x: e4m3 with scale_x [m, ceil(k/128)], or bf16 | fp16 | fp32 without (W8A16). b: packed [1, ...]
 * with marks, scale_b fp32 [ceil(n/128), ceil(k/128)], or [n, ceil(k/128)] for a b in blocks
 * (1, 128). y: bf16 | fp16 | fp32. */
DSK_API int dsk_gemm(const DLTensor* x, const DLTensor* scale_x, const DLTensor* packed,
                     const DLTensor* marks, const DLTensor* scale_b, const DLTensor* c,
                     const DLTensor* bias, const DLTensor* y, int num_threads);

/* ---- mla ---- */

/* q [b, s, h, dl + r]; cache [pages, page, dl + r] of q's type or bf16, or uint8 rows of FP8
 * (dl e4m3 | fp32 scale per 128 | r bf16); block_table int32 [b, max_pages]; seq_lens int32 [b]
 * -> out [b, s, h, dl], lse fp32 [b, h, s]. */
DSK_API int dsk_mla_decode(const DLTensor* q, const DLTensor* cache, const DLTensor* block_table,
                           const DLTensor* seq_lens, double softmax_scale, int causal,
                           const DLTensor* out, const DLTensor* lse, int num_threads);

/* q, k [t, h, dqk], v [t, h, dv] of one type; cu_seqlens int32 [requests + 1] -> out [t, h, dv],
 * lse fp32 [h, t]. Rows behind the last request are left as they are. */
DSK_API int dsk_mla_prefill(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                            const DLTensor* cu_seqlens_q, const DLTensor* cu_seqlens_k,
                            double softmax_scale, int causal, const DLTensor* out,
                            const DLTensor* lse, int num_threads);

/* The gradients of q, k and v, contiguous and of their type, from grad [t, h, dv] of that type and
 * grad_lse fp32 [h, t] (NULL: zeros). out and lse are what dsk_mla_prefill left; queries that
 * attend nothing get 0. Rows behind the last request are left as they are. Does not depend on
 * num_threads. */
DSK_API int dsk_mla_prefill_backward(const DLTensor* grad, const DLTensor* grad_lse,
                                     const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                     const DLTensor* out, const DLTensor* lse,
                                     const DLTensor* cu_seqlens_q, const DLTensor* cu_seqlens_k,
                                     double softmax_scale, int causal, const DLTensor* dq,
                                     const DLTensor* dk, const DLTensor* dv, int num_threads);

/* latent [t, dl], k_rope [t, r] (bf16 | fp16 | fp32) into cache [pages, page, row] at slots int64
 * [t] = page index * page + offset (-1: none), in place: rows of dl + r bf16 | fp16 | fp32 values,
 * or uint8 rows of FP8 (see dsk_mla_decode), the latent quantised. Of tokens that share a slot the
 * last one stays. */
DSK_API int dsk_mla_cache_append(const DLTensor* cache, const DLTensor* latent,
                                 const DLTensor* k_rope, const DLTensor* slots, int num_threads);

/* ---- moe ---- */

/* x [t, d] (bf16 | fp16 | fp32), w13 packed [e, 2 i, d] = [gate; up], w2 packed [e, d, i], i a
 * multiple of 64, scales fp32 [e, ceil(n/128), ceil(k/128)], topk_idx int64 [t, k] (-1: none),
 * topk_weights fp32 [t, k] -> out [t, d] of x's type. quantize: W8A8, else W8A16. */
DSK_API int dsk_moe_experts(const DLTensor* x, const DLTensor* w13, const DLTensor* marks13,
                            const DLTensor* scale13, const DLTensor* w2, const DLTensor* marks2,
                            const DLTensor* scale2, const DLTensor* topk_idx,
                            const DLTensor* topk_weights, int64_t intermediate, int quantize,
                            const DLTensor* out, int num_threads);

/* The router. x [t, d], weight [e, d] (bf16 | fp16 | fp32), bias fp32 [e] or NULL; the e experts
 * lie in num_groups groups, of which topk_group are in the running. -> topk_idx int64 [t, k] by
 * falling biased score, topk_weights fp32 [t, k], scores fp32 [t, e]. group_by_sum: a group's rank
 * is the sum of its two best biased scores, else its best. */
DSK_API int dsk_moe_gate(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                         int64_t num_groups, int64_t topk_group, double scale, int softmax,
                         int group_by_sum, int renormalize, const DLTensor* topk_idx,
                         const DLTensor* topk_weights, const DLTensor* scores, int num_threads);

/* Its gradients. grad_weights fp32 [t, k] and grad_scores fp32 [t, e] to dx [t, d] of x's type and
 * dweight [e, d] of weight's; topk_idx and scores are what dsk_moe_gate left. The choice is a
 * constant. */
DSK_API int dsk_moe_gate_backward(const DLTensor* grad_weights, const DLTensor* grad_scores,
                                  const DLTensor* x, const DLTensor* weight,
                                  const DLTensor* topk_idx, const DLTensor* scores, double scale,
                                  int softmax, int renormalize, const DLTensor* dx,
                                  const DLTensor* dweight, int num_threads);

/* A stable counting sort of topk_idx int64 [t, k] (-1: none) by expert -> counts int64 [e],
 * group_sizes int64 [e] (counts rounded up to alignment), row_map int64 [t, k] (-1: none). */
DSK_API int dsk_moe_layout(const DLTensor* topk_idx, int64_t alignment, const DLTensor* counts,
                           const DLTensor* group_sizes, const DLTensor* row_map);

/* x [t, d] to the rows of row_map in out [sum of group_sizes, d]; padding rows become 0. The other
 * arguments are dsk_moe_layout's. */
DSK_API int dsk_moe_permute(const DLTensor* x, const DLTensor* row_map, const DLTensor* counts,
                            const DLTensor* group_sizes, const DLTensor* out, int num_threads);

/* out [t, d] = sum over k of topk_weights fp32 [t, k] (NULL: ones) times y [m, d] at row_map int64
 * [t, k] (-1: none); fp32 sums in order of k. */
DSK_API int dsk_moe_unpermute(const DLTensor* y, const DLTensor* row_map,
                              const DLTensor* topk_weights, const DLTensor* out, int num_threads);

/* Its gradients: grad [t, d] -> dy [m, d] (only rows that row_map names, each at most once, are
 * written) and dweights fp32 [t, k]. */
DSK_API int dsk_moe_unpermute_backward(const DLTensor* grad, const DLTensor* y,
                                       const DLTensor* row_map, const DLTensor* topk_weights,
                                       const DLTensor* dy, const DLTensor* dweights,
                                       int num_threads);

#ifdef __cplusplus
}
#endif
#endif /* DSKERNELS_H_ */
