// A model as the Embedded Learning Library compiles it, in C by hand: y = max(x, 0) + x on four floats.
// The names and types are those that ELL's headers declare (libraries/emitters, header writer).
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef struct TensorShape { int32_t rows, columns, channels; } TensorShape;

#ifndef MODULE_ELEMENT
#define MODULE_ELEMENT float
#endif
#define SIZE 4

#ifdef MODULE_PROFILED
typedef struct { const char *nodeName, *nodeType; } NodeInfo;
typedef struct { int count; double totalTime; } Counters;
static NodeInfo infos[2] = {{"2", "ReLUActivationNode"}, {"3", "BinaryOperationNode"}};
static Counters counters[2];
static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}
NodeInfo *relu_GetNodeInfo(int32_t index) { return &infos[index]; }
Counters *relu_GetNodePerformanceCounters(int32_t index) { return &counters[index]; }
#define BEGIN(node) double began##node = now()
#define END(node) (counters[node].count++, counters[node].totalTime += now() - began##node)
#else
#define BEGIN(node)
#define END(node)
#endif

void relu_Predict(void *context, MODULE_ELEMENT *input, MODULE_ELEMENT *output)
{
    (void)context;
    MODULE_ELEMENT positive[SIZE];
    BEGIN(0);
    for (int at = 0; at < SIZE; at++)
        positive[at] = input[at] > 0 ? input[at] : 0;
    END(0);
    BEGIN(1);
    for (int at = 0; at < SIZE; at++)
        output[at] = positive[at] + input[at];
    END(1);
#ifdef MODULE_CRASHES
    *(volatile int *)0 = 0;
#endif
}

void relu_Reset(void) {}
int32_t relu_GetNumNodes(void) { return 2; }

#ifdef MODULE_OLD
// Before models had several inputs, these had no index.
int32_t relu_GetInputSize(void) { return SIZE; }
int32_t relu_GetOutputSize(void) { return SIZE; }
#else
int32_t relu_GetInputSize(int32_t index) { return index == 0 ? SIZE : 0; }
int32_t relu_GetOutputSize(int32_t index) { return index == 0 ? SIZE : 0; }
#endif

static void shape_of(int32_t index, TensorShape *shape)
{
    memset(shape, 0, sizeof *shape);
    if (index == 0) {
        shape->rows = 1;
        shape->columns = 1;
        shape->channels = SIZE;
    }
}
void relu_GetInputShape(int32_t index, TensorShape *shape) { shape_of(index, shape); }
void relu_GetOutputShape(int32_t index, TensorShape *shape) { shape_of(index, shape); }
char *relu_GetMetadata(char *key) { (void)key; return 0; }
#ifdef MODULE_CALLS_BACK
void relu_InputCallback(void *context, float *input);
void relu_Other(void *context, float *input) { relu_InputCallback(context, input); }
#endif
