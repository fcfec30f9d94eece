/*
 * The part of TensorFlow Lite's C ABI that a delegate sees, declared by hand.
 *
 * Source of every layout: tensorflow/tensorflow, tensorflow/lite/core/c/common.h and
 * tensorflow/lite/core/c/c_api_types.h (Apache-2.0; the same files are in google-ai-edge/LiteRT
 * under tflite/core/c). The header there promises that fields are only ever appended.
 * Checked by running against tflite-runtime 2.14 and ai-edge-litert 2.3; the two differ only in
 * what was appended to TfLiteRegistration, see there.
 *
 * Holds for 64-bit machines. On 32-bit ARM a struct passed by value shifts the arguments behind
 * it, so TfLiteRegistration would have to have the exact length that the interpreter expects.
 */
#ifndef BOARDBENCH_TESTS_STANDIN_TFLITE_ABI_H
#define BOARDBENCH_TESTS_STANDIN_TFLITE_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(sizeof(void *) == 8, "the stand-in is for 64-bit machines");

/* c_api_types.h: TfLiteStatus. */
typedef enum { kOk = 0, kError = 1, kDelegateError = 2 } TfLiteStatus;

/* c_api_types.h: TfLiteType; only the codes that are told apart here. */
enum {
  kFloat32 = 1,
  kInt32 = 2,
  kUInt8 = 3,
  kInt64 = 4,
  kString = 5,
  kBool = 6,
  kInt16 = 7,
  kComplex64 = 8,
  kInt8 = 9,
  kFloat16 = 10,
  kFloat64 = 11,
  kComplex128 = 12,
  kUInt64 = 13,
  kResource = 14,
  kVariant = 15,
  kUInt32 = 16,
  kUInt16 = 17,
};

/* common.h: TfLiteAllocationType; the codes that matter to a delegate. */
enum { kMmapRo = 1, kDynamic = 4 };

/* common.h: TfLiteIntArray. Made by malloc and freed by free in both interpreters. */
typedef struct {
  int size;
  int data[];
} TfLiteIntArray;

/* c_api_types.h: TfLiteQuantizationParams. */
typedef struct {
  float scale;
  int32_t zero_point;
} TfLiteQuantizationParams;

/* common.h: TfLiteQuantization. */
typedef struct {
  int type;
  void *params;
} TfLiteQuantization;

struct TfLiteContext;
struct TfLiteDelegate;

/* common.h: TfLiteTensor (the one without TF_LITE_STATIC_MEMORY). */
typedef struct {
  int type;
  void *data;
  TfLiteIntArray *dims;
  TfLiteQuantizationParams params;
  int allocation_type;
  size_t bytes;
  const void *allocation;
  const char *name;
  struct TfLiteDelegate *delegate;
  int buffer_handle;
  bool data_is_stale;
  bool is_variable;
  TfLiteQuantization quantization;
  void *sparsity;
  const TfLiteIntArray *dims_signature;
} TfLiteTensor;

/* common.h: TfLiteNode (the one without TF_LITE_STATIC_MEMORY). */
typedef struct {
  TfLiteIntArray *inputs;
  TfLiteIntArray *outputs;
  TfLiteIntArray *intermediates;
  TfLiteIntArray *temporaries;
  void *user_data;
  void *builtin_data;
  const void *custom_initial_data;
  int custom_initial_data_size;
  struct TfLiteDelegate *delegate;
  bool might_have_side_effect;
} TfLiteNode;

/*
 * common.h: TfLiteRegistration, the newest layout. The interpreter takes it by value, which on
 * x86-64 and aarch64 means that it copies as much as it knows: too long is harmless, too short
 * lets it read what lies behind. One that comes *from* an interpreter may be shorter, so only the
 * fields up to `version`, which every release has, are ever read.
 */
typedef struct {
  void *(*init)(struct TfLiteContext *, const char *, size_t);
  void (*free)(struct TfLiteContext *, void *);
  TfLiteStatus (*prepare)(struct TfLiteContext *, TfLiteNode *);
  TfLiteStatus (*invoke)(struct TfLiteContext *, TfLiteNode *);
  const char *(*profiling_string)(const struct TfLiteContext *, const TfLiteNode *);
  int32_t builtin_code;
  const char *custom_name;
  int version;
  void *registration_external; /* 2.7 and later */
  void *async_kernel;          /* 2.11 and later */
  uint64_t inplace_operator;   /* 2.15 and later */
} TfLiteRegistration;

/* common.h: TfLiteDelegateParams; what a delegate kernel's init gets as its buffer. */
typedef struct {
  struct TfLiteDelegate *delegate;
  TfLiteIntArray *nodes_to_replace;
  TfLiteIntArray *input_tensors;
  TfLiteIntArray *output_tensors;
} TfLiteDelegateParams;

/* common.h: TfLiteContext, up to the last function that is called here. */
typedef struct TfLiteContext {
  size_t tensors_size;
  TfLiteStatus (*GetExecutionPlan)(struct TfLiteContext *, TfLiteIntArray **);
  TfLiteTensor *tensors; /* moves whenever a kernel adds tensors: never keep a pointer into it */
  void *impl_;
  TfLiteStatus (*ResizeTensor)(struct TfLiteContext *, TfLiteTensor *, TfLiteIntArray *);
  void (*ReportError)(struct TfLiteContext *, const char *, ...);
  TfLiteStatus (*AddTensors)(struct TfLiteContext *, int, int *);
  TfLiteStatus (*GetNodeAndRegistration)(struct TfLiteContext *, int, TfLiteNode **,
                                         TfLiteRegistration **);
  TfLiteStatus (*ReplaceNodeSubsetsWithDelegateKernels)(struct TfLiteContext *,
                                                        TfLiteRegistration,
                                                        const TfLiteIntArray *,
                                                        struct TfLiteDelegate *);
  int recommended_num_threads;
  void *(*GetExternalContext)(struct TfLiteContext *, int);
  void (*SetExternalContext)(struct TfLiteContext *, int, void *);
  bool allow_fp32_relax_to_fp16;
  void *profiler;
  void *(*AllocatePersistentBuffer)(struct TfLiteContext *, size_t);
  TfLiteStatus (*AllocateBufferForEval)(struct TfLiteContext *, size_t, void **);
  TfLiteStatus (*RequestScratchBufferInArena)(struct TfLiteContext *, size_t, int *);
  void *(*GetScratchBuffer)(struct TfLiteContext *, int);
  TfLiteStatus (*ResizeTensorExplicit)(struct TfLiteContext *, TfLiteTensor *, int, const int *);
  TfLiteStatus (*PreviewDelegatePartitioning)(struct TfLiteContext *, const TfLiteIntArray *,
                                              TfLiteDelegateParams **, int *);
} TfLiteContext;

/* common.h: TfLiteDelegate. */
typedef struct TfLiteDelegate {
  void *data_;
  TfLiteStatus (*Prepare)(TfLiteContext *, struct TfLiteDelegate *);
  TfLiteStatus (*CopyFromBufferHandle)(TfLiteContext *, struct TfLiteDelegate *, int, TfLiteTensor *);
  TfLiteStatus (*CopyToBufferHandle)(TfLiteContext *, struct TfLiteDelegate *, int, TfLiteTensor *);
  void (*FreeBufferHandle)(TfLiteContext *, struct TfLiteDelegate *, int *);
  int64_t flags;
  void *opaque_delegate_builder;
} TfLiteDelegate;

/* common.h: kTfLiteDelegateFlagsAllowDynamicTensors. Google's delegate sets it too. */
#define ALLOW_DYNAMIC_TENSORS 1

#endif
