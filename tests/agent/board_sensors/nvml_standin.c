/* A stand-in for NVIDIA's libnvidia-ml.so.1: the few functions that boardbench calls, for tests without a GPU.
 *
 * Two cards. What they answer is in the environment, so that a test can change it while the library is loaded:
 * NVML_STANDIN_LACKS names functions that card 1 answers with "not supported" (all of them: "*"),
 * NVML_STANDIN_FAILS the same with "GPU is lost", NVML_STANDIN_INIT is the result of nvmlInit, and
 * NVML_STANDIN_SAMPLES is a file with a line a sample, "microseconds percent", of card 0.
 * Types and values by docs.nvidia.com/deploy/nvml-api.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

typedef struct { int index; } device;
static device cards[2] = {{0}, {1}};

const char *boardbench_standin = "libnvidia-ml";

static int listed(const char *variable, const char *function) {
    const char *names = getenv(variable);
    return names != NULL && (strcmp(names, "*") == 0 || strstr(names, function) != NULL);
}

static int refusal(const device *card, const char *function) {
    if (card->index != 1) return SUCCESS;
    if (listed("NVML_STANDIN_FAILS", function)) return GPU_IS_LOST;
    return listed("NVML_STANDIN_LACKS", function) ? NOT_SUPPORTED : SUCCESS;
}

#define REFUSE(card)                                        \
    do {                                                    \
        int refused = refusal(card, __func__);              \
        if (refused) return refused;                        \
    } while (0)

static int starts(void) {
    const char *result = getenv("NVML_STANDIN_INIT");
    return result ? atoi(result) : SUCCESS;
}

int nvmlInit_v2(void) { return starts(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return starts(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int result) { return result == GPU_IS_LOST ? "GPU is lost" : "stand-in error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **card) {
    if (index > 1) return 2;
    *card = &cards[index];
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device *card, unsigned *milliwatts) {
    REFUSE(card);
    *milliwatts = 71500 + 1000 * card->index;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(device *card, unsigned long long *millijoules) {
    REFUSE(card);
    *millijoules = 123456789ULL;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(device *card, int sensor, unsigned *celsius) {
    REFUSE(card);
    if (sensor != 0) return 2;
    *celsius = 54;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(device *card, int kind, unsigned *megahertz) {
    REFUSE(card);
    *megahertz = kind == 1 ? 1410 : kind == 2 ? 6001 : 300;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device *card, unsigned long long *reasons) {
    REFUSE(card);
    *reasons = 0x04 | 0x20; /* power limit, heat */
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetCurrentClocksEventReasons(device *card, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksThrottleReasons(card, reasons);
}
#endif

int nvmlDeviceGetUtilizationRates(device *card, struct { unsigned gpu, memory; } *rates) {
    REFUSE(card);
    rates->gpu = 87;
    rates->memory = 31;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(device *card, struct { unsigned long long total, unused, used; } *memory) {
    REFUSE(card);
    memory->total = 12ULL << 30;
    memory->used = 3ULL << 30;
    memory->unused = memory->total - memory->used;
    return SUCCESS;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process;

int nvmlDeviceGetComputeRunningProcesses_v3(device *card, unsigned *count, process *processes) {
    static const process running[3] = {
        {4242, 2ULL << 30, 0, 0}, {17, 512ULL << 20, 0, 0}, {18, ~0ULL /* not available */, 0, 0}};
    REFUSE(card);
    if (*count < 3 || processes == NULL) {
        *count = 3;
        return INSUFFICIENT_SIZE;
    }
    memcpy(processes, running, sizeof running);
    *count = 3;
    return SUCCESS;
}

typedef struct {
    unsigned long long micros;
    union { unsigned ui; unsigned long long ull; } value;
} sample;

int nvmlDeviceGetSamples(device *card, int kind, unsigned long long since, int *type, unsigned *count,
                         sample *samples) {
    REFUSE(card);
    const char *path = getenv("NVML_STANDIN_SAMPLES");
    FILE *file = path && card->index == 0 && kind == 1 ? fopen(path, "r") : NULL;
    unsigned found = 0, room = samples ? *count : 0;
    unsigned long long micros;
    unsigned percent;
    if (file == NULL) return NOT_SUPPORTED;
    while (fscanf(file, "%llu %u", &micros, &percent) == 2) {
        if (micros <= since) continue;
        if (samples) {
            if (found == room) break;
            samples[found].micros = micros;
            samples[found].value.ull = 0;
            samples[found].value.ui = percent;
        }
        found++;
    }
    fclose(file);
    *type = 1;
    *count = found;
    return found ? SUCCESS : NOT_FOUND;
}
