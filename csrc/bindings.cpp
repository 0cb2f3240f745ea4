// SPDX-License-Identifier: Apache-2.0
//
// The pybind11 module `_C`: each C function under its name without the `sdxl_fast_` prefix, pointers and streams as
// integers (0 = null), the GIL released during the call. Meaning of arguments: include/sdxl_fast.h.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "sdxl_fast.h"

namespace py = pybind11;

namespace {

template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T to_c(FromPython<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

template <class Result, class... Args>
void expose(py::module_& m, const char* name, Result (*function)(Args...)) {
    m.def(
        name, [function](FromPython<Args>... args) { return function(to_c<Args>(args)...); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#define EXPOSE(name) expose(m, #name, sdxl_fast_##name)

PYBIND11_MODULE(_C, m) {
    m.doc() = "Thin binding of libsdxl_fast; the C header describes every function.";
    m.attr("HEADER_ABI") = SDXL_FAST_ABI;
    m.def("abi", &sdxl_fast_abi);
    m.def("build_info", &sdxl_fast_build_info);
    m.def("cpu_isa", &sdxl_fast_cpu_isa);
    m.def("set_cpu_isa", &sdxl_fast_set_cpu_isa);
    m.def("cpu_threading", &sdxl_fast_cpu_threading);
    m.def("status_text", &sdxl_fast_status_text);

    EXPOSE(group_norm_silu_workspace_cpu);
    EXPOSE(group_norm_silu_workspace_cuda);
    EXPOSE(group_norm_silu_fwd_cpu);
    EXPOSE(group_norm_silu_fwd_cuda);
    EXPOSE(group_norm_silu_e4m3_fwd_cuda);
    EXPOSE(group_norm_silu_bwd_cpu);
    EXPOSE(group_norm_silu_bwd_cuda);
    EXPOSE(geglu_fwd_cpu);
    EXPOSE(geglu_fwd_cuda);
    EXPOSE(geglu_e4m3_fwd_cuda);
    EXPOSE(geglu_bwd_cpu);
    EXPOSE(geglu_bwd_cuda);
    EXPOSE(forward_diffusion_fwd_cpu);
    EXPOSE(forward_diffusion_fwd_cuda);
    EXPOSE(forward_diffusion_bwd_cpu);
    EXPOSE(forward_diffusion_bwd_cuda);
    EXPOSE(ddim_move_fwd_cpu);
    EXPOSE(ddim_move_fwd_cuda);
    EXPOSE(ddim_move_bwd_cpu);
    EXPOSE(ddim_move_bwd_cuda);
    EXPOSE(layer_norm_workspace_cpu);
    EXPOSE(layer_norm_workspace_cuda);
    EXPOSE(layer_norm_fwd_cpu);
    EXPOSE(layer_norm_fwd_cuda);
    EXPOSE(layer_norm_e4m3_fwd_cuda);
    EXPOSE(layer_norm_bwd_cpu);
    EXPOSE(layer_norm_bwd_cuda);
    EXPOSE(lora_merge_fwd_cpu);
    EXPOSE(lora_merge_plan_cuda);
    EXPOSE(lora_merge_fwd_cuda);
    EXPOSE(to_uint8_fwd_cpu);
    EXPOSE(to_uint8_fwd_cuda);
    EXPOSE(linear_fwd_cuda);
    EXPOSE(linear_geglu_fwd_cuda);
    EXPOSE(conv2d_fwd_cuda);
    EXPOSE(upsample_conv2d_fwd_cuda);
    EXPOSE(disc_head_workspace_cuda);
    EXPOSE(disc_head_fwd_cuda);
    EXPOSE(disc_head_bwd_cuda);
    EXPOSE(token_head_workspace_cpu);
    EXPOSE(token_head_workspace_cuda);
    EXPOSE(token_head_fwd_cpu);
    EXPOSE(token_head_fwd_cuda);
    EXPOSE(token_head_bwd_cpu);
    EXPOSE(token_head_bwd_cuda);
    EXPOSE(attention_fwd_cpu);
    EXPOSE(attention_bwd_cpu);
    EXPOSE(streamed_attention_workspace_cpu);
    EXPOSE(streamed_attention_fwd_cpu);
    EXPOSE(packed_conv2d_fwd_cpu);
    EXPOSE(winograd_conv2d_fwd_cpu);
}
