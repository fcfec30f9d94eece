/*
 * A stand-in for the Edge TPU: an external delegate for TensorFlow Lite, for tests only.
 *
 * Real interpreters load it through load_delegate in the place of libedgetpu.so.1. It takes
 * compiled nodes (edgetpu-custom-op) and fills their outputs with a pattern, or takes real nodes
 * and computes them with the interpreter's own kernels, bit for bit. It waits, fails and counts
 * as its options say. The options are in README.md beside this file.
 *
 * Behaviour that it copies, all in google-coral/libedgetpu under tflite/:
 *   edgetpu_delegate_for_custom_op.cc                one delegate kernel for each compiled node
 *   edgetpu_delegate_for_custom_op_tflite_plugin.cc  "device" and the other options; NULL without
 *                                                    a word when the device can't be opened
 *   public/edgetpu_c.h                               the C API
 * and driver/package_registry.cc: the check of the runtime version.
 * The entry points of an external delegate: tensorflow/tensorflow,
 * tensorflow/lite/delegates/external/external_delegate_interface.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tflite_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* By this symbol, and by nothing else, a stand-in is told from hardware. */
EXPORT extern const char boardbench_standin[];
const char boardbench_standin[] = "standin-edgetpu";

/* libedgetpu carries the same words (port/default/builddata.cc): how "std" is told from "max". */
#ifdef STANDIN_THROTTLED
EXPORT const volatile char boardbench_standin_performance[] = "PERFORMANCE=THROTTLED";
#else
EXPORT const volatile char boardbench_standin_performance[] = "PERFORMANCE=DIRECT";
#endif

enum { BUILTIN_CUSTOM = 32, BUILTIN_DELEGATE = 51, BUILTIN_COUNT = 256 };

static const char *const OP_NAMES[BUILTIN_COUNT] = {
#define OP(code, name) [code] = #name,
#include "tflite_ops.h"
#undef OP
};

static const struct {
  const char *name;
  int code;
} DATA_TYPES[] = {
    {"float32", kFloat32}, {"int32", kInt32},   {"uint8", kUInt8},   {"int64", kInt64},
    {"bool", kBool},       {"int16", kInt16},   {"int8", kInt8},     {"float16", kFloat16},
    {"float64", kFloat64}, {"uint64", kUInt64}, {"uint32", kUInt32}, {"uint16", kUInt16},
};

/* ---------------------------------------------------------------------------------------------
 * Options
 */

typedef struct {
  char **keys;
  char **values;
  size_t count;
} Given;

static const char *const OPTIONS[] = {
    /* Google's own */
    "device", "Performance", "Usb.AlwaysDfu", "Usb.MaxBulkInQueueLength",
    /* what is taken */
    "claim", "claim_types", "leave_types", "data_types", "nodes", "max_tensor_bytes",
    "max_tensor_elements", "max_constant_bytes", "max_partitions",
    /* what it costs */
    "delay_us", "op_delay_us", "byte_delay_ns", "first_delay_us", "create_delay_us",
    "prepare_delay_us", "wait",
    /* what fails */
    "fail_at", "fail_as", "fail_after", "fail_text",
    /* the machine around it */
    "devices", "runtime_version", "interrupt_counts", "interrupt_line", "urbnum", "urbs_per_invoke",
    "log",
};

/* The value given to load_delegate, else the one in the environment, else NULL. */
static const char *option(const Given *given, const char *key) {
  for (size_t i = 0; given && i < given->count; ++i)
    if (!strcmp(given->keys[i], key)) return given->values[i];
  char name[96] = "BOARDBENCH_STANDIN_";
  size_t at = strlen(name);
  for (const char *c = key; *c && at + 1 < sizeof name; ++c)
    name[at++] = *c >= 'a' && *c <= 'z' ? (char)(*c - 'a' + 'A') : *c == '.' ? '_' : *c;
  name[at] = 0;
  return getenv(name);
}

typedef enum { AT_NEVER, AT_CREATE, AT_CLAIM, AT_PREPARE, AT_INVOKE } FailAt;
typedef enum { AS_ERROR, AS_SILENT, AS_ABORT, AS_SEGFAULT, AS_HANG } FailAs;

typedef struct {
  TfLiteDelegate delegate; /* first: a TfLiteDelegate* is a Standin* */
  bool claim_custom, claim_ops, spin;
  bool types_given, data_types_given;
  bool types[BUILTIN_COUNT], left_types[BUILTIN_COUNT], data_types[64];
  char *custom_names; /* claim_types that are no builtin: names of custom operators */
  int (*node_ranges)[2];
  size_t node_range_count;
  int64_t max_tensor_bytes, max_tensor_elements, max_constant_bytes, max_partitions;
  int64_t delay_us, op_delay_us, byte_delay_ns, first_delay_us, prepare_delay_us;
  int64_t clock_divider; /* 1 at full speed; 8 at Performance=Low */
  FailAt fail_at;
  FailAs fail_as;
  int64_t fail_after;
  char *fail_text;
  int64_t runtime_version;
  char *interrupt_counts, *urbnum, *log;
  int64_t interrupt_line, urbs_per_invoke;
  int64_t invokes, fails_passed;
  uint64_t injected_ns;
  struct {
    uint64_t waited_ns, taken_ns;
  } *runs; /* of every run, kept only for a log */
  size_t runs_room;
} Standin;

/* Over the life of the process, for tests that compare a report with what was injected. */
static uint64_t total_injected_ns, total_invokes;
EXPORT uint64_t boardbench_standin_injected_nanoseconds(void) { return total_injected_ns; }
EXPORT uint64_t boardbench_standin_invokes(void) { return total_invokes; }

static int verbosity;

/* port/default/port_from_tf/logging.cc: "%c %s:%d] %s\n" on stderr. */
static void verbose(int level, const char *format, ...) {
  if (verbosity < level) return;
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "I edgetpu_standin.c:%d] ", __LINE__);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  fflush(stderr);
  va_end(arguments);
}

/* ---------------------------------------------------------------------------------------------
 * The log: one JSON object a line, appended
 */

typedef struct {
  char *text;
  size_t length;
  FILE *stream;
} Line;

static void line_open(Line *line, const char *event) {
  *line = (Line){0};
  line->stream = open_memstream(&line->text, &line->length); /* keeps both addresses */
  if (!line->stream) abort();
  fprintf(line->stream, "{\"event\": \"%s\"", event);
}

static void line_string(Line *line, const char *text) {
  fputc('"', line->stream);
  for (const unsigned char *c = (const unsigned char *)(text ? text : ""); *c; ++c) {
    if (*c == '"' || *c == '\\')
      fprintf(line->stream, "\\%c", *c);
    else if (*c < 0x20)
      fprintf(line->stream, "\\u%04x", *c);
    else
      fputc(*c, line->stream);
  }
  fputc('"', line->stream);
}

static void line_array(Line *line, const char *key, const TfLiteIntArray *array) {
  fprintf(line->stream, ", \"%s\": [", key);
  for (int i = 0; i < array->size; ++i) fprintf(line->stream, i ? ", %d" : "%d", array->data[i]);
  fputc(']', line->stream);
}

static void line_close(Line *line, const char *path) {
  fputs("}\n", line->stream);
  fclose(line->stream);
  FILE *file = fopen(path, "a");
  if (file) {
    fwrite(line->text, 1, line->length, file);
    fclose(file);
  }
  free(line->text);
}

/* ---------------------------------------------------------------------------------------------
 * Time
 */

static uint64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Returns the nanoseconds that really went by. Sleeping is what waiting for a device looks like
 * from outside; spinning is what it looks like when the work is done on the CPU after all. */
static uint64_t wait_ns(uint64_t nanoseconds, bool spin) {
  if (!nanoseconds) return 0;
  const uint64_t start = now_ns(), end = start + nanoseconds;
  if (spin) {
    while (now_ns() < end) {
    }
  } else {
    const struct timespec until = {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
  }
  return now_ns() - start;
}

/* ---------------------------------------------------------------------------------------------
 * Failure
 */

/* Whether this step is to fail now. Does not come back from the ways that end or stop the process. */
static bool fails(Standin *self, FailAt at) {
  if (self->fail_at != at || self->fails_passed++ < self->fail_after) return false;
  switch (self->fail_as) {
    case AS_ABORT:
      fprintf(stderr, "F edgetpu_standin.c:%d] %s\n", __LINE__, self->fail_text);
      abort();
    case AS_SEGFAULT:
      raise(SIGSEGV);
      break;
    case AS_HANG:
      for (;;) pause();
    case AS_ERROR:
    case AS_SILENT:
      break;
  }
  return true;
}

static TfLiteStatus fail_in(Standin *self, TfLiteContext *context) {
  if (self->fail_as == AS_ERROR) context->ReportError(context, "%s", self->fail_text);
  return kError;
}

/* ---------------------------------------------------------------------------------------------
 * What is taken
 */

static TfLiteTensor *tensor_at(TfLiteContext *context, int index) {
  return index >= 0 && (size_t)index < context->tensors_size ? &context->tensors[index] : NULL;
}

static const char *type_name(const TfLiteRegistration *registration) {
  const int code = registration->builtin_code;
  if (registration->custom_name) return registration->custom_name;
  return code >= 0 && code < BUILTIN_COUNT && OP_NAMES[code] ? OP_NAMES[code] : "UNKNOWN";
}

/* True if `word` is one of the comma-separated words of `list`. */
static bool listed(const char *list, const char *word) {
  const size_t length = strlen(word);
  for (const char *at = list; at && *at;) {
    const size_t here = strcspn(at, ",");
    if (here == length && !strncmp(at, word, length)) return true;
    at += here;
    at += *at == ',';
  }
  return false;
}

/* Operators that run other subgraphs can't be lifted out of theirs. */
static bool runs_subgraphs(const char *name) {
  return !strcmp(name, "IF") || !strcmp(name, "WHILE") || !strcmp(name, "CALL") ||
         !strcmp(name, "CALL_ONCE") || !strncmp(name, "STABLEHLO_", 10);
}

static const char *tensor_refused(const Standin *self, const TfLiteTensor *tensor) {
  if (tensor->type == kString || tensor->type == kResource || tensor->type == kVariant)
    return "no plain tensor";
  if (tensor->allocation_type == kMmapRo)
    return self->max_constant_bytes >= 0 && tensor->bytes > (size_t)self->max_constant_bytes
               ? "constant bytes"
               : NULL;
  if (self->data_types_given &&
      (tensor->type < 0 || tensor->type >= (int)COUNT(self->data_types) ||
       !self->data_types[tensor->type]))
    return "data type";
  if (self->max_tensor_bytes >= 0 && tensor->bytes > (size_t)self->max_tensor_bytes)
    return "tensor bytes";
  if (self->max_tensor_elements >= 0 && tensor->dims) {
    int64_t elements = 1;
    for (int i = 0; i < tensor->dims->size; ++i) elements *= tensor->dims->data[i];
    if (elements > self->max_tensor_elements) return "tensor elements";
  }
  return NULL;
}

/* Why a node is not taken; NULL when it is. */
static const char *refused(const Standin *self, TfLiteContext *context, int index, const TfLiteNode *node,
                           const TfLiteRegistration *registration) {
  const int code = registration->builtin_code;
  const char *name = type_name(registration);
  if (!self->claim_ops) return "claim";
  if (code == BUILTIN_DELEGATE || node->delegate) return "another delegate's";
  if (!registration->invoke || runs_subgraphs(name)) return "kind of operator";
  if (self->node_range_count) {
    bool found = false;
    for (size_t i = 0; i < self->node_range_count && !found; ++i)
      found = index >= self->node_ranges[i][0] && index <= self->node_ranges[i][1];
    if (!found) return "nodes";
  }
  const bool builtin = code >= 0 && code < BUILTIN_COUNT && code != BUILTIN_CUSTOM;
  if (builtin ? self->types_given && !self->types[code]
              : !self->types_given || !listed(self->custom_names, name))
    return "type";
  if (builtin && self->left_types[code]) return "type";
  const TfLiteIntArray *const both[] = {node->inputs, node->outputs};
  for (size_t side = 0; side < COUNT(both); ++side)
    for (int i = 0; i < both[side]->size; ++i) {
      const TfLiteTensor *tensor = tensor_at(context, both[side]->data[i]);
      const char *why = tensor ? tensor_refused(self, tensor) : NULL;
      if (why) return why;
    }
  return NULL;
}

/* ---------------------------------------------------------------------------------------------
 * The delegate kernel
 */

typedef struct {
  int index;
  TfLiteNode node; /* a copy: the interpreter's own moves when its list of nodes grows */
  TfLiteStatus (*prepare)(TfLiteContext *, TfLiteNode *);
  TfLiteStatus (*invoke)(TfLiteContext *, TfLiteNode *);
  char *name;
} Op;

typedef struct {
  Standin *standin;
  bool custom;          /* one compiled node; else real ones */
  int required_version; /* of the package in a compiled node; 0 when it can't be read */
  bool ran;
  int op_count;
  Op *ops;
} Kernel;

static TfLiteIntArray *int_array(int size) {
  TfLiteIntArray *array = calloc(1, sizeof(TfLiteIntArray) + sizeof(int) * (size_t)(size ? size : 1));
  if (array) array->size = size;
  return array;
}

static uint32_t read_u32(const uint8_t *at) {
  return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/*
 * The min_runtime_version of a compiled node's package, or 0 when it has none that can be read.
 * The package is a FlatBuffer with the identifier DWN1 inside the node's options
 * (google-coral/libedgetpu, executable/executable.fbs); its first field is the version.
 */
static int package_version(const uint8_t *options, size_t length) {
  for (size_t at = 4; at + 4 <= length; ++at) {
    if (memcmp(options + at, "DWN1", 4)) continue;
    const uint8_t *package = options + at - 4;
    const size_t size = length - (at - 4);
    const size_t table = read_u32(package);
    if (table > size - 4) return 0;
    const int64_t vtable = (int64_t)table - (int32_t)read_u32(package + table);
    if (vtable < 0 || (size_t)vtable + 6 > size) return 0;
    const size_t vtable_length = package[vtable] | (size_t)package[vtable + 1] << 8;
    const size_t field = package[vtable + 4] | (size_t)package[vtable + 5] << 8;
    if (vtable_length < 6 || !field || table + field + 4 > size) return 0;
    return (int)read_u32(package + table + field);
  }
  return 0;
}

static void kernel_free(TfLiteContext *context, void *data) {
  (void)context;
  Kernel *kernel = data;
  if (!kernel) return;
  for (int i = 0; kernel->ops && i < kernel->op_count; ++i) {
    free(kernel->ops[i].node.temporaries);
    free(kernel->ops[i].name);
  }
  free(kernel->ops);
  free(kernel);
}

static void *kernel_init(TfLiteContext *context, const char *buffer, size_t length) {
  (void)length;
  const TfLiteDelegateParams *params = (const void *)buffer;
  const TfLiteIntArray *nodes = params->nodes_to_replace;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return NULL;
  kernel->standin = (Standin *)params->delegate;
  kernel->op_count = nodes->size;
  kernel->ops = calloc((size_t)nodes->size + 1, sizeof *kernel->ops);
  for (int i = 0; kernel->ops && i < nodes->size; ++i) {
    TfLiteNode *node;
    TfLiteRegistration *registration;
    if (context->GetNodeAndRegistration(context, nodes->data[i], &node, &registration) != kOk) {
      kernel_free(context, kernel);
      return NULL;
    }
    Op *op = &kernel->ops[i];
    op->index = nodes->data[i];
    op->node = *node;
    /* A kernel's prepare frees and remakes its temporaries: it must not be the interpreter's copy. */
    op->node.temporaries = int_array(0);
    op->prepare = registration->prepare;
    op->invoke = registration->invoke;
    op->name = strdup(type_name(registration));
    if (registration->custom_name && !strcmp(registration->custom_name, "edgetpu-custom-op")) {
      kernel->custom = true;
      if (node->custom_initial_data && node->custom_initial_data_size > 0)
        kernel->required_version =
            package_version(node->custom_initial_data, (size_t)node->custom_initial_data_size);
    }
  }
  if (kernel->standin->log) {
    Line line;
    line_open(&line, "partition");
    line_array(&line, "nodes", nodes);
    line_array(&line, "inputs", params->input_tensors);
    line_array(&line, "outputs", params->output_tensors);
    fprintf(line.stream, ", \"custom\": %s", kernel->custom ? "true" : "false");
    line_close(&line, kernel->standin->log);
  }
  return kernel;
}

static bool contains(const TfLiteIntArray *array, int value) {
  for (int i = 0; i < array->size; ++i)
    if (array->data[i] == value) return true;
  return false;
}

/*
 * Prepares the taken nodes in their order and asks for the memory that they need: tensors between
 * them, and their scratch, belong to nobody in the new execution plan, and so would get none.
 * They become temporaries of the delegate node, alive as long as it runs.
 */
static TfLiteStatus prepare_ops(Kernel *kernel, TfLiteContext *context, TfLiteNode *node) {
  int upper = 0;
  for (int i = 0; i < kernel->op_count; ++i) {
    Op *op = &kernel->ops[i];
    if (op->prepare && op->prepare(context, &op->node) != kOk) {
      context->ReportError(context, "stand-in: node %d (%s) failed to prepare", op->index, op->name);
      return kError;
    }
    upper += op->node.outputs->size + op->node.temporaries->size;
    for (int k = 0; k < op->node.outputs->size; ++k) {
      const TfLiteTensor *tensor = tensor_at(context, op->node.outputs->data[k]);
      if (tensor && tensor->allocation_type == kDynamic) {
        context->ReportError(context,
                             "stand-in: node %d (%s) has an output whose size is known only when "
                             "it runs; leave it out by leave_types or nodes",
                             op->index, op->name);
        return kError;
      }
    }
  }
  TfLiteIntArray *temporaries = int_array(upper);
  if (!temporaries) return kError;
  temporaries->size = 0;
  for (int i = 0; i < kernel->op_count; ++i) {
    const TfLiteIntArray *const both[] = {kernel->ops[i].node.outputs, kernel->ops[i].node.temporaries};
    for (size_t side = 0; side < COUNT(both); ++side)
      for (int k = 0; k < both[side]->size; ++k) {
        const int index = both[side]->data[k];
        if (index >= 0 && !contains(node->outputs, index) && !contains(temporaries, index))
          temporaries->data[temporaries->size++] = index;
      }
  }
  free(node->temporaries);
  node->temporaries = temporaries;
  return kOk;
}

static TfLiteStatus kernel_prepare(TfLiteContext *context, TfLiteNode *node) {
  Kernel *kernel = node->user_data;
  if (!kernel) {
    context->ReportError(context, "Null custom op data.");
    return kError;
  }
  Standin *self = kernel->standin;
  wait_ns((uint64_t)self->prepare_delay_us * 1000, self->spin);
  if (fails(self, AT_PREPARE)) return fail_in(self, context);
  if (!kernel->custom) return prepare_ops(kernel, context, node);
  if (kernel->required_version > self->runtime_version) {
    context->ReportError(context,
                         "Failed to prepare for TPU. Failed precondition: Package requires runtime "
                         "version (%d), which is newer than this runtime version (%d).",
                         kernel->required_version, (int)self->runtime_version);
    return kError;
  }
  return kOk;
}

/* A cheap digest of the inputs, so that the pattern shows whether data flow. */
static uint64_t digest_inputs(TfLiteContext *context, const TfLiteNode *node) {
  uint64_t digest = 0x9e3779b97f4a7c15u;
  for (int i = 0; i < node->inputs->size; ++i) {
    const TfLiteTensor *tensor = tensor_at(context, node->inputs->data[i]);
    if (!tensor || !tensor->data || tensor->allocation_type == kMmapRo) continue;
    size_t at = 0;
    for (; at + 8 <= tensor->bytes; at += 8) {
      uint64_t word;
      memcpy(&word, (const char *)tensor->data + at, 8);
      digest = (digest ^ word) * 0x100000001b3u;
      digest ^= digest >> 29;
    }
    for (; at < tensor->bytes; ++at)
      digest = (digest ^ ((const uint8_t *)tensor->data)[at]) * 0x100000001b3u;
  }
  return digest;
}

static uint64_t next_word(uint64_t *state) {
  uint64_t x = *state ? *state : 1;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return *state = x;
}

/* Fills a tensor: any byte in 8-bit tensors, small whole numbers in wider ones, [0, 1) in floats. */
static void fill(TfLiteTensor *tensor, uint64_t state) {
  const size_t bytes = tensor->bytes;
  uint8_t *data = tensor->data;
  next_word(&state);
  for (size_t at = 0; at < bytes;) {
    const uint64_t word = next_word(&state);
    const uint8_t small = (uint8_t)(word >> 32);
    uint64_t value = word;
    size_t width = 8;
    switch (tensor->type) {
      case kInt8:
      case kUInt8:
        break;
      case kBool:
        value = small & 1, width = 1;
        break;
      case kInt16:
      case kUInt16:
        value = small, width = 2;
        break;
      case kInt32:
      case kUInt32:
        value = small, width = 4;
        break;
      case kInt64:
      case kUInt64:
        value = small;
        break;
      case kFloat16:
        value = 0x3800 | (word >> 55), width = 2; /* [0.5, 1) */
        break;
      case kFloat32: {
        const float real = (float)small / 256.0f;
        value = 0, width = 4;
        memcpy(&value, &real, 4);
        break;
      }
      case kFloat64: {
        const double real = (double)small / 256.0;
        memcpy(&value, &real, 8);
        break;
      }
      default:
        value = 0;
    }
    if (width > bytes - at) width = bytes - at;
    memcpy(data + at, &value, width); /* little-endian, as every machine that TFLite runs on */
    at += width;
  }
}

/* Adds to one line "0x04: 12" of an interrupt_counts file as gasket_interrupt.c (google/gasket-driver) prints it. */
static void move_interrupts(const char *path, int64_t line_number) {
  FILE *file = fopen(path, "r+");
  if (!file) return;
  char text[4096], moved[8192];
  const size_t length = fread(text, 1, sizeof text - 1, file);
  text[length] = 0;
  size_t written = 0;
  for (char *rest = text, *line; (line = strsep(&rest, "\n")) && written < sizeof moved - 64;) {
    long number, count;
    if (!*line) continue;
    if (sscanf(line, "0x%lx: %ld", (unsigned long *)&number, &count) == 2)
      written += (size_t)snprintf(moved + written, sizeof moved - written, "0x%02lx: %ld\n", number,
                                  count + (number == line_number));
  }
  rewind(file);
  fwrite(moved, 1, written, file);
  fflush(file);
  if (ftruncate(fileno(file), (off_t)written)) verbose(1, "%s: %s", path, strerror(errno));
  fclose(file);
}

/* Adds to the decimal number in a file, as the kernel's urbnum. */
static void move_number(const char *path, int64_t by) {
  FILE *file = fopen(path, "r+");
  if (!file) return;
  long long count = 0;
  if (fscanf(file, "%lld", &count) == 1) {
    rewind(file);
    fprintf(file, "%lld\n", count + (long long)by);
  }
  fclose(file);
}

/* Notes how long a run waited, and how long it took with all that it did besides. */
static void note_run(Standin *self, uint64_t waited_ns, uint64_t taken_ns) {
  const size_t at = (size_t)self->invokes;
  if (at >= self->runs_room) {
    const size_t room = at ? 2 * at : 1024;
    void *larger = realloc(self->runs, room * sizeof *self->runs);
    if (!larger) abort();
    self->runs = larger;
    self->runs_room = room;
  }
  self->runs[at].waited_ns = waited_ns;
  self->runs[at].taken_ns = taken_ns;
}

static TfLiteStatus kernel_invoke(TfLiteContext *context, TfLiteNode *node) {
  Kernel *kernel = node->user_data;
  Standin *self = kernel->standin;
  const uint64_t began = now_ns();
  if (fails(self, AT_INVOKE)) return fail_in(self, context);

  if (kernel->custom) {
    const uint64_t digest = digest_inputs(context, node);
    for (int i = 0; i < node->outputs->size; ++i) {
      TfLiteTensor *tensor = tensor_at(context, node->outputs->data[i]);
      if (!tensor || !tensor->data) {
        context->ReportError(context, "stand-in: output %d of a compiled node has no memory", i);
        return kError;
      }
      fill(tensor, digest + (uint64_t)i * 0x2545f4914f6cdd1du);
    }
  } else {
    for (int i = 0; i < kernel->op_count; ++i) {
      Op *op = &kernel->ops[i];
      if (op->invoke(context, &op->node) != kOk) {
        context->ReportError(context, "stand-in: node %d (%s) failed to invoke", op->index, op->name);
        return kError;
      }
    }
  }

  uint64_t crossing = 0;
  const TfLiteIntArray *const both[] = {node->inputs, node->outputs};
  for (size_t side = 0; side < COUNT(both); ++side)
    for (int i = 0; i < both[side]->size; ++i) {
      const TfLiteTensor *tensor = tensor_at(context, both[side]->data[i]);
      if (tensor && tensor->allocation_type != kMmapRo) crossing += tensor->bytes;
    }
  uint64_t wait = (uint64_t)(self->delay_us * 1000 + self->op_delay_us * 1000 * kernel->op_count);
  wait = wait * (uint64_t)self->clock_divider + crossing * (uint64_t)self->byte_delay_ns;
  if (!kernel->ran) wait += (uint64_t)self->first_delay_us * 1000;
  kernel->ran = true;
  const uint64_t waited = wait_ns(wait, self->spin);
  if (self->interrupt_counts) move_interrupts(self->interrupt_counts, self->interrupt_line);
  if (self->urbnum) move_number(self->urbnum, self->urbs_per_invoke);
  if (self->log) note_run(self, waited, now_ns() - began);
  self->injected_ns += waited;
  total_injected_ns += waited;
  ++self->invokes;
  ++total_invokes;
  return kOk;
}

/* ---------------------------------------------------------------------------------------------
 * The delegate
 */

static const char *const DELEGATE_NAME = "EdgeTpuDelegateForCustomOp";

static TfLiteStatus claim(TfLiteContext *context, TfLiteDelegate *delegate) {
  Standin *self = (Standin *)delegate;
  if (fails(self, AT_CLAIM)) return fail_in(self, context);

  TfLiteIntArray *plan;
  if (context->GetExecutionPlan(context, &plan) != kOk) return kError;
  const int count = plan->size;
  TfLiteIntArray *nodes = int_array(count), *compiled = int_array(count), *taken = int_array(count);
  const char **why = calloc((size_t)count + 1, sizeof *why);
  char **names = calloc((size_t)count + 1, sizeof *names);
  TfLiteStatus status = kError;
  if (!nodes || !compiled || !taken || !why || !names) goto done;
  memcpy(nodes->data, plan->data, sizeof(int) * (size_t)count);

  compiled->size = taken->size = 0;
  for (int i = 0; i < count; ++i) {
    TfLiteNode *node;
    TfLiteRegistration *registration;
    if (context->GetNodeAndRegistration(context, nodes->data[i], &node, &registration) != kOk) goto done;
    names[i] = strdup(type_name(registration));
    if (registration->custom_name && !strcmp(registration->custom_name, "edgetpu-custom-op")) {
      if (self->claim_custom)
        compiled->data[compiled->size++] = nodes->data[i];
      else
        why[i] = "claim";
    } else if (!(why[i] = refused(self, context, nodes->data[i], node, registration))) {
      taken->data[taken->size++] = nodes->data[i];
    }
  }

  if (taken->size && self->max_partitions >= 0) {
    TfLiteDelegateParams *parts;
    int parts_count = 0;
    if (context->PreviewDelegatePartitioning(context, taken, &parts, &parts_count) != kOk) goto done;
    for (int p = (int)self->max_partitions; p < parts_count; ++p)
      for (int k = 0; k < parts[p].nodes_to_replace->size; ++k)
        for (int i = 0; i < count; ++i)
          if (nodes->data[i] == parts[p].nodes_to_replace->data[k]) why[i] = "more than one subgraph";
    taken->size = 0;
    for (int i = 0; i < count; ++i)
      if (!why[i] && strcmp(names[i], "edgetpu-custom-op")) taken->data[taken->size++] = nodes->data[i];
  }

  if (self->log) {
    Line line;
    line_open(&line, "claim");
    fputs(", \"taken\": [", line.stream);
    bool first = true;
    for (int i = 0; i < count; ++i)
      if (!why[i]) {
        fprintf(line.stream, first ? "{\"node\": %d, \"type\": " : ", {\"node\": %d, \"type\": ", nodes->data[i]);
        line_string(&line, names[i]);
        fputc('}', line.stream);
        first = false;
      }
    fputs("], \"left\": [", line.stream);
    first = true;
    for (int i = 0; i < count; ++i)
      if (why[i]) {
        fprintf(line.stream, first ? "{\"node\": %d, \"type\": " : ", {\"node\": %d, \"type\": ", nodes->data[i]);
        line_string(&line, names[i]);
        fputs(", \"why\": ", line.stream);
        line_string(&line, why[i]);
        fputc('}', line.stream);
        first = false;
      }
    fputc(']', line.stream);
    line_close(&line, self->log);
  }

  const TfLiteRegistration registration = {
      .init = kernel_init,
      .free = kernel_free,
      .prepare = kernel_prepare,
      .invoke = kernel_invoke,
      .builtin_code = BUILTIN_DELEGATE,
      .custom_name = DELEGATE_NAME,
      .version = 1,
  };
  status = kOk;
  /* Google's delegate replaces its nodes one by one, so that two neighbours stay two. */
  for (int i = 0; i < compiled->size && status == kOk; ++i) {
    TfLiteIntArray *one = int_array(1);
    if (!one) {
      status = kError;
      break;
    }
    one->data[0] = compiled->data[i];
    status = context->ReplaceNodeSubsetsWithDelegateKernels(context, registration, one, delegate);
    free(one);
  }
  if (status == kOk && taken->size)
    status = context->ReplaceNodeSubsetsWithDelegateKernels(context, registration, taken, delegate);

done:
  for (int i = 0; names && i < count; ++i) free(names[i]);
  free(names);
  free(why);
  free(nodes);
  free(compiled);
  free(taken);
  return status;
}

/* ---------------------------------------------------------------------------------------------
 * Devices: the C API of libedgetpu
 */

struct edgetpu_device {
  int type; /* 0 PCIe, 1 USB */
  const char *path;
};

struct edgetpu_option {
  const char *name;
  const char *value;
};

EXPORT struct edgetpu_device *edgetpu_list_devices(size_t *num_devices);
EXPORT void edgetpu_free_devices(struct edgetpu_device *devices);
EXPORT TfLiteDelegate *edgetpu_create_delegate(int type, const char *name,
                                               const struct edgetpu_option *options, size_t num_options);
EXPORT void edgetpu_free_delegate(TfLiteDelegate *delegate);
EXPORT void edgetpu_verbosity(int level);
EXPORT const char *edgetpu_version(void);
EXPORT TfLiteDelegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count,
                                                     void (*report)(const char *));
EXPORT void tflite_plugin_destroy_delegate(TfLiteDelegate *delegate);

/* "usb:/sys/bus/usb/devices/2-1,pci:/dev/apex_0" -> one block that free takes; NULL when there is none. */
static struct edgetpu_device *list_devices(const Given *given, size_t *count) {
  const char *text = option(given, "devices");
  if (!text) text = "usb:/sys/bus/usb/devices/2-1";
  size_t commas = 1;
  for (const char *c = text; *c; ++c) commas += *c == ',';
  const size_t head = commas * sizeof(struct edgetpu_device);
  struct edgetpu_device *devices = calloc(1, head + strlen(text) + 1);
  *count = 0;
  if (!devices) return NULL;
  char *copy = strcpy((char *)devices + head, text);
  for (char *word; (word = strsep(&copy, ","));) {
    const bool usb = !strncmp(word, "usb:", 4), pci = !strncmp(word, "pci:", 4);
    if (usb || pci) devices[(*count)++] = (struct edgetpu_device){usb, word + 4};
  }
  if (*count) return devices;
  free(devices);
  return NULL;
}

struct edgetpu_device *edgetpu_list_devices(size_t *num_devices) { return list_devices(NULL, num_devices); }

void edgetpu_free_devices(struct edgetpu_device *devices) { free(devices); }

void edgetpu_verbosity(int level) {
  if (level >= 0 && level <= 10) verbosity = level;
}

const char *edgetpu_version(void) {
  static char text[64];
  const char *version = option(NULL, "runtime_version");
  snprintf(text, sizeof text, "BuildLabel(standin), RuntimeVersion(%s)", version ? version : "14");
  return text;
}

/* Whether the "device" option names a device that is there; the forms are those of Google's plugin. */
static bool device_there(const Given *given, bool *indexed) {
  const char *wanted = option(given, "device");
  if (!wanted) wanted = "";
  size_t count;
  struct edgetpu_device *devices = list_devices(given, &count);
  const char *colon = strchr(wanted, ':');
  const size_t kind_length = colon ? (size_t)(colon - wanted) : strlen(wanted);
  const bool usb = kind_length == 3 && !strncmp(wanted, "usb", 3);
  const bool pci = kind_length == 3 && !strncmp(wanted, "pci", 3);
  bool found = false;
  *indexed = colon != NULL;
  if (usb || pci || !kind_length) {
    char *end = NULL;
    long index = colon ? strtol(colon + 1, &end, 10) : 0;
    if (!colon || (end != colon + 1 && !*end && index >= 0))
      for (size_t i = 0; i < count && !found; ++i)
        if (!kind_length || devices[i].type == (usb ? 1 : 0)) found = index-- == 0;
  }
  if (!found) verbose(5, "No device of type %s is available.", pci ? "Apex (PCIe)" : "Apex (USB)");
  free(devices);
  return found;
}

/* ---------------------------------------------------------------------------------------------
 * Making and ending it
 */

typedef struct {
  const Given *given;
  char problem[256];
} Reader;

static void complain(Reader *reader, const char *format, ...) {
  if (*reader->problem) return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reader->problem, sizeof reader->problem, format, arguments);
  va_end(arguments);
}

static int64_t number(Reader *reader, const char *key, int64_t otherwise) {
  const char *text = option(reader->given, key);
  if (!text || !*text) return otherwise;
  char *end;
  errno = 0;
  const long long value = strtoll(text, &end, 10);
  if (*end || errno || value < 0) complain(reader, "stand-in: %s=%s is not a number from 0 on", key, text);
  return value;
}

/* Which of `words` the option is; the first when it is not given. */
static int choice(Reader *reader, const char *key, const char *const *words, size_t count) {
  const char *text = option(reader->given, key);
  if (!text || !*text) return 0;
  for (size_t i = 0; i < count; ++i)
    if (!strcmp(text, words[i])) return (int)i;
  complain(reader, "stand-in: %s=%s is not known", key, text);
  return 0;
}

static char *text_or_null(Reader *reader, const char *key) {
  const char *text = option(reader->given, key);
  return text && *text ? strdup(text) : NULL;
}

static void read_types(Reader *reader, const char *key, bool *types, char **others) {
  char *text = text_or_null(reader, key), *rest = text;
  for (char *word; rest && (word = strsep(&rest, ","));) {
    int code = -1;
    for (int i = 0; i < BUILTIN_COUNT; ++i)
      if (OP_NAMES[i] && !strcmp(OP_NAMES[i], word)) code = i;
    if (code >= 0)
      types[code] = true;
    else if (!others || word[strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")] == 0)
      complain(reader, "stand-in: %s: no operator %s", key, word);
  }
  if (others) *others = text_or_null(reader, key);
  free(text);
}

static void read_nodes(Reader *reader, Standin *self) {
  char *text = text_or_null(reader, "nodes"), *rest = text;
  if (!text) return;
  self->node_ranges = calloc(strlen(text) + 1, sizeof *self->node_ranges);
  for (char *word; self->node_ranges && (word = strsep(&rest, ","));) {
    int first, last, used = 0;
    if (sscanf(word, "%d-%d%n", &first, &last, &used) != 2 || word[used]) {
      if (sscanf(word, "%d%n", &first, &used) != 1 || word[used]) complain(reader, "stand-in: nodes=%s", word);
      last = first;
    }
    self->node_ranges[self->node_range_count][0] = first;
    self->node_ranges[self->node_range_count++][1] = last;
  }
  free(text);
}

static void read_data_types(Reader *reader, Standin *self) {
  char *text = text_or_null(reader, "data_types"), *rest = text;
  self->data_types_given = text != NULL;
  for (char *word; rest && (word = strsep(&rest, ","));) {
    bool found = false;
    for (size_t i = 0; i < COUNT(DATA_TYPES); ++i)
      if (!strcmp(DATA_TYPES[i].name, word)) found = self->data_types[DATA_TYPES[i].code] = true;
    if (!found) complain(reader, "stand-in: data_types: no type %s", word);
  }
  free(text);
}

static void read_options(Reader *reader, Standin *self) {
  static const char *const claims[] = {"custom", "ops", "both", "none"};
  static const char *const waits[] = {"sleep", "spin"};
  static const char *const steps[] = {"never", "create", "claim", "prepare", "invoke"};
  static const char *const ways[] = {"error", "silent", "abort", "segfault", "hang"};
  static const char *const speeds[] = {"Max", "High", "Medium", "Low"};
  for (size_t i = 0; i < reader->given->count; ++i) {
    bool known = false;
    for (size_t k = 0; k < COUNT(OPTIONS) && !known; ++k) known = !strcmp(OPTIONS[k], reader->given->keys[i]);
    if (!known) complain(reader, "stand-in: no option %s", reader->given->keys[i]);
  }
  const int claimed = choice(reader, "claim", claims, COUNT(claims));
  self->claim_custom = claimed == 0 || claimed == 2;
  self->claim_ops = claimed == 1 || claimed == 2;
  self->spin = choice(reader, "wait", waits, COUNT(waits));
  self->fail_at = (FailAt)choice(reader, "fail_at", steps, COUNT(steps));
  self->fail_as = (FailAs)choice(reader, "fail_as", ways, COUNT(ways));
  self->fail_after = number(reader, "fail_after", 0);
  const char *text = option(reader->given, "fail_text");
  self->fail_text = strdup(text && *text ? text : "stand-in: told to fail");
  read_types(reader, "claim_types", self->types, &self->custom_names);
  self->types_given = self->custom_names != NULL;
  read_types(reader, "leave_types", self->left_types, NULL);
  read_data_types(reader, self);
  read_nodes(reader, self);
  self->max_tensor_bytes = number(reader, "max_tensor_bytes", -1);
  self->max_tensor_elements = number(reader, "max_tensor_elements", -1);
  self->max_constant_bytes = number(reader, "max_constant_bytes", -1);
  self->max_partitions = number(reader, "max_partitions", -1);
  self->delay_us = number(reader, "delay_us", 0);
  self->op_delay_us = number(reader, "op_delay_us", 0);
  self->byte_delay_ns = number(reader, "byte_delay_ns", 0);
  self->first_delay_us = number(reader, "first_delay_us", 0);
  self->prepare_delay_us = number(reader, "prepare_delay_us", 0);
  self->clock_divider = 1 << choice(reader, "Performance", speeds, COUNT(speeds));
  self->runtime_version = number(reader, "runtime_version", 14);
  self->interrupt_counts = text_or_null(reader, "interrupt_counts");
  self->interrupt_line = number(reader, "interrupt_line", 4); /* 4: scalar core host 0, apex_driver.c */
  self->urbnum = text_or_null(reader, "urbnum");
  self->urbs_per_invoke = number(reader, "urbs_per_invoke", 4);
  self->log = text_or_null(reader, "log");
}

static void destroy(Standin *self) {
  if (!self) return;
  free(self->custom_names);
  free(self->node_ranges);
  free(self->fail_text);
  free(self->interrupt_counts);
  free(self->urbnum);
  free(self->log);
  free(self->runs);
  free(self);
}

TfLiteDelegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count,
                                              void (*report)(const char *)) {
  const Given given = {keys, values, count};
  Reader reader = {.given = &given};
  Standin *self = calloc(1, sizeof *self);
  if (!self) return NULL;
  read_options(&reader, self);
  if (*reader.problem) {
    if (report) report(reader.problem);
    destroy(self);
    return NULL;
  }
  wait_ns((uint64_t)number(&reader, "create_delay_us", 0) * 1000, self->spin);
  if (fails(self, AT_CREATE)) {
    if (self->fail_as == AS_ERROR && report) report(self->fail_text);
    if (self->fail_as == AS_SILENT) verbose(1, "%s", self->fail_text);
    destroy(self);
    return NULL;
  }
  bool indexed;
  if (!device_there(&given, &indexed)) {
    destroy(self);
    return NULL;
  }
  if (!indexed) self->clock_divider = 1; /* Google's plugin passes options on only to a device by index */
  self->delegate = (TfLiteDelegate){.data_ = self, .Prepare = claim, .flags = ALLOW_DYNAMIC_TENSORS};
  if (self->log) {
    Line line;
    line_open(&line, "create");
    fprintf(line.stream, ", \"clock_divider\": %" PRId64 ", \"options\": {", self->clock_divider);
    for (size_t i = 0; i < count; ++i) {
      if (i) fputs(", ", line.stream);
      line_string(&line, keys[i]);
      fputs(": ", line.stream);
      line_string(&line, values[i]);
    }
    fputc('}', line.stream);
    line_close(&line, self->log);
  }
  return &self->delegate;
}

void tflite_plugin_destroy_delegate(TfLiteDelegate *delegate) {
  Standin *self = (Standin *)delegate;
  if (self && self->log) {
    Line line;
    line_open(&line, "destroy");
    fprintf(line.stream, ", \"invokes\": %" PRId64 ", \"injected_nanoseconds\": %" PRIu64, self->invokes,
            self->injected_ns);
    fputs(", \"runs\": [", line.stream);
    for (int64_t i = 0; i < self->invokes; ++i)
      fprintf(line.stream, "%s{\"waited_nanoseconds\": %" PRIu64 ", \"taken_nanoseconds\": %" PRIu64 "}",
              i ? ", " : "", self->runs[i].waited_ns, self->runs[i].taken_ns);
    fputc(']', line.stream);
    line_close(&line, self->log);
  }
  destroy(self);
}

TfLiteDelegate *edgetpu_create_delegate(int type, const char *name, const struct edgetpu_option *options,
                                        size_t num_options) {
  (void)name;
  char *keys[COUNT(OPTIONS)], *values[COUNT(OPTIONS)];
  size_t count = 0;
  keys[count] = "device", values[count++] = type ? "usb:0" : "pci:0";
  for (size_t i = 0; i < num_options && count < COUNT(keys); ++i) {
    keys[count] = (char *)options[i].name;
    values[count++] = (char *)options[i].value;
  }
  return tflite_plugin_create_delegate(keys, values, count, NULL);
}

void edgetpu_free_delegate(TfLiteDelegate *delegate) { tflite_plugin_destroy_delegate(delegate); }
