# The C++ backend.
set(sdxl_fast_isas baseline)
target_sources(sdxl_fast PRIVATE cpu/group_norm_silu.cpp cpu/geglu.cpp cpu/forward_diffusion.cpp cpu/dispatch.cpp)
