/* A stand-in for CUDA's runtime library, for machines without a GPU of NVIDIA's.
 *
 * As on a real GPU an address of device memory is none of this process (it is moved up by an offset that no
 * mapping has), copies check their direction and bounds, and nothing that is put into a stream happens before
 * the stream is waited for. Prototypes: https://docs.nvidia.com/cuda/cuda-runtime-api/
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

const char boardbench_standin[64] = "standin-cuda";

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_READY = 600, NO_DEVICE = 100 };
enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2 };
enum { COPY, CALL, EVENT };

static const uintptr_t OFFSET = (uintptr_t)1 << 62;

struct block { uintptr_t at; size_t size; struct block *next; };
static struct block *blocks;
static size_t taken;

typedef void (*host_function)(void *);
struct event { double at; int happened; };
struct work {
    int kind; void *to; const void *from; size_t size; host_function call; void *data;
    struct event *event; struct work *next;
};
struct stream { struct work *first, **last; };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* For the fake TensorRT: where bytes of the "device" really are; NULL for what is not on it. */
void *boardbench_device(const void *address, size_t size) {
    uintptr_t at = (uintptr_t)address;
    for (struct block *b = blocks; b; b = b->next)
        if (at >= b->at + OFFSET && at + size <= b->at + OFFSET + b->size)
            return (void *)(at - OFFSET);
    return NULL;
}
size_t boardbench_taken(void) { return taken; }

const char *cudaGetErrorString(int status) {
    switch (status) {
    case OK: return "no error";
    case INVALID: return "invalid argument";
    case NO_MEMORY: return "out of memory";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case NOT_READY: return "device not ready";
    default: return "unknown error";
    }
}
int cudaGetDeviceCount(int *count) {
    const char *gone = getenv("STANDIN_CUDA_NO_DEVICE");
    *count = gone ? 0 : 1;
    return gone ? NO_DEVICE : OK;
}
int cudaRuntimeGetVersion(int *version) { *version = 12060; return OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 0) return INVALID;
    switch (attribute) {
    case 16: *value = 16; return OK;
    case 75: *value = 8; return OK;
    case 76: *value = 7; return OK;
    default: return INVALID;
    }
}
int cudaMalloc(void **address, size_t size) {
    const char *limit = getenv("STANDIN_CUDA_BYTES");
    if (limit && taken + size > strtoull(limit, NULL, 10)) return NO_MEMORY;
    struct block *b = malloc(sizeof *b);
    b->at = (uintptr_t)calloc(1, size);
    b->size = size;
    b->next = blocks;
    blocks = b;
    taken += size;
    *address = (void *)(b->at + OFFSET);
    return OK;
}
int cudaFree(void *address) {
    for (struct block **b = &blocks; *b; b = &(*b)->next)
        if ((void *)((*b)->at + OFFSET) == address) {
            struct block *gone = *b;
            *b = gone->next;
            taken -= gone->size;
            free((void *)gone->at);
            free(gone);
            return OK;
        }
    return INVALID;
}
int cudaHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    taken += size;
    size_t *held = malloc(size + 16);
    held[0] = size;
    *address = held + 2;
    return OK;
}
int cudaFreeHost(void *address) {
    size_t *held = (size_t *)address - 2;
    taken -= held[0];
    free(held);
    return OK;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    if (flags > 1) return INVALID;
    struct stream *s = malloc(sizeof *s);
    s->first = NULL;
    s->last = &s->first;
    *stream = s;
    return OK;
}
int cudaStreamDestroy(void *stream) { free(stream); return OK; }
static int put(struct stream *s, struct work work) {
    struct work *w = malloc(sizeof *w);
    *w = work;
    w->next = NULL;
    *s->last = w;
    s->last = &w->next;
    return OK;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    if (!stream) return INVALID;
    void *real_to = kind == HOST_TO_DEVICE ? boardbench_device(to, size) : to;
    const void *real_from = kind == DEVICE_TO_HOST ? boardbench_device(from, size) : from;
    if (kind != HOST_TO_DEVICE && kind != DEVICE_TO_HOST) return INVALID;
    if (!real_to || !real_from) return INVALID;
    return put(stream, (struct work){.kind = COPY, .to = real_to, .from = real_from, .size = size});
}
int cudaLaunchHostFunc(void *stream, host_function call, void *data) {
    return put(stream, (struct work){.kind = CALL, .call = call, .data = data});
}
int cudaEventCreate(void **event) { *event = calloc(1, sizeof(struct event)); return OK; }
int cudaEventDestroy(void *event) { free(event); return OK; }
int cudaEventRecord(void *event, void *stream) {
    ((struct event *)event)->happened = 0;
    return put(stream, (struct work){.kind = EVENT, .event = event});
}
int cudaEventElapsedTime(float *milliseconds, void *first, void *second) {
    struct event *a = first, *b = second;
    if (!a->happened || !b->happened) return NOT_READY;
    *milliseconds = (float)(b->at - a->at);
    return OK;
}
int cudaStreamSynchronize(void *stream) {
    struct stream *s = stream;
    while (s->first) {
        struct work *w = s->first;
        s->first = w->next;
        if (!s->first) s->last = &s->first;
        if (w->kind == COPY) memcpy(w->to, w->from, w->size);
        else if (w->kind == CALL) w->call(w->data);
        else { w->event->at = now(); w->event->happened = 1; }
        free(w);
    }
    return OK;
}
