// SPDX-License-Identifier: Apache-2.0
#include <string.h>
#include "sdxl_fast.h"
extern "C" {
const char* sdxl_fast_cpu_isa(void) { return "baseline"; }
int32_t sdxl_fast_set_cpu_isa(const char* name) {
    return strcmp(name, "baseline") == 0 || strcmp(name, "auto") == 0 ? SDXL_FAST_OK : SDXL_FAST_INVALID_ARGUMENT;
}
const char* sdxl_fast_cpu_threading(void) { return "pool"; }
}
